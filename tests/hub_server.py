"""A hub of models and datasets on this machine: as much of the Hugging Face hub's interface as is used.

Its client, `huggingface_hub`, is the real one, pointed here by HF_ENDPOINT.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

TOKEN = "hf_of_someone_who_may_write"


class Hub:
    """What the hub holds."""

    def __init__(self) -> None:
        self.url = ""
        self.models: dict[str, dict[str, bytes]] = {}
        """By name; another revision than the newest is of a name of its own, `org/name@revision`."""
        self.datasets: dict[str, dict[str, bytes]] = {}
        """Likewise."""
        self.private: set[str] = set()
        self.gated: set[str] = set()
        """Of which everyone sees that they are there, and nobody gets a file."""
        self.objects: dict[str, bytes] = {}
        """Large files, by their SHA-256."""

    def dataset_commit(self, name: str) -> str:
        """The commit of a dataset, by its name or `org/name@revision`."""
        return _commit_of(self.datasets[name])

    def model(self, name: str, revision: str) -> dict[str, bytes] | None:
        """A model's files at a revision, be it a name or a commit."""
        return _at(self.models, name, revision)

    def dataset(self, name: str, revision: str) -> dict[str, bytes] | None:
        """A dataset's files at a revision, be it a name or a commit."""
        return _at(self.datasets, name, revision)


def _at(held: dict[str, dict[str, bytes]], name: str, revision: str) -> dict[str, bytes] | None:
    if revision == "main":
        return held.get(name)
    of_name = [files for key, files in held.items() if key.partition("@")[0] == name]
    of_commit = (files for files in of_name if _commit_of(files) == revision)
    return held.get(f"{name}@{revision}") or next(of_commit, None)


def _commit_of(files: dict[str, bytes]) -> str:
    listed = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in files.items())
    return hashlib.sha1(repr(listed).encode()).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub, for as long as the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route(_GET)

    def do_HEAD(self) -> None:
        self._route(_GET)

    def do_POST(self) -> None:
        if "/paths-info/" in self.path or self.headers.get("Authorization") == f"Bearer {TOKEN}":
            self._route(_POST)
        else:
            self._answer(401, {"error": "Invalid username or password."})

    def _route(self, routes: dict[str, str]) -> None:
        path = unquote(self.path.partition("?")[0])
        for pattern, method in routes.items():
            if found := re.fullmatch(pattern, path):
                getattr(self, method)(*found.groups())
                return
        self._answer(404, {"error": f"{self.command} {path}"})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _whoami(self) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self._answer(*((200, {"name": "someone"}) if known else (401, {"error": "Invalid username"})))

    def _valid(self) -> None:
        self._body()
        self._answer(200, {"errors": [], "warnings": []})

    def _model(self, name: str, revision: str | None) -> dict[str, bytes] | None:
        """A model's files; None once it was answered that there are none."""
        return self._or_not_found(self.hub.model(name, unquote(revision or "main")), name in self.hub.models)

    def _or_not_found(self, files: dict[str, bytes] | None, known: bool) -> dict[str, bytes] | None:
        """Files that are there; else it is answered that they are not, of something that is known or not."""
        if files is None:
            code = "RevisionNotFound" if known else "RepoNotFound"
            self._answer(404, {"error": code}, {"X-Error-Code": code})
        return files

    def _branch(self, name: str, branch: str) -> None:
        self._body()
        if f"{name}@{branch}" in self.hub.models:
            return self._answer(409, {"error": "Reference already exists"})
        self.hub.models[f"{name}@{branch}"] = dict(self.hub.models[name])
        return self._answer(200, {})

    def _preupload(self, name: str, revision: str) -> None:
        files = json.loads(self._body())["files"]
        modes = ["lfs" if f["path"].endswith((".safetensors", ".png")) else "regular" for f in files]
        answer = [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False}
                  for f, mode in zip(files, modes, strict=True)]  # fmt: skip
        self._answer(200, {"files": answer})

    def _create(self) -> None:
        asked = json.loads(self._body())
        name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        if name in self.hub.models:
            return self._answer(409, {"error": "You already created this model repo", "url": self._url(name)})
        self.hub.models[name] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(name)
        return self._answer(200, {"url": self._url(name), "name": name, "id": name})

    def _url(self, name: str) -> str:
        return f"{self.hub.url}/{name}"

    def _batch(self, name: str) -> None:
        answer = []
        for asked in json.loads(self._body())["objects"]:
            known = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                known["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{asked['oid']}"}}
            answer.append(known)
        self._answer(200, {"transfer": "basic", "objects": answer})

    def _commit(self, name: str, revision: str) -> None:
        files = self._model(name, revision)
        if files is None:
            return
        for line in map(json.loads, self._body().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = _commit_of(files)
        url = f"{self._url(name)}/commit/{commit}"
        self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _about(self, name: str, revision: str | None) -> None:
        files = self._model(name, revision)
        if files is not None:
            self._answer(200, {"id": name, "modelId": name, "sha": _commit_of(files),
                               "siblings": [{"rfilename": path} for path in files],
                               "private": name in self.hub.private, "tags": [], "downloads": 0,
                               "gated": "manual" if name in self.hub.gated else False})  # fmt: skip

    def _tree(self, name: str, revision: str) -> None:
        files = self._model(name, revision)
        if files is not None:
            self._answer(200, [{"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                               for path, content in files.items()])  # fmt: skip

    def _file(self, name: str, revision: str, path: str) -> None:
        files = self._model(name, revision)
        if files is not None:
            self._send_file(name, files, path)

    def _send_file(self, name: str, files: dict[str, bytes], path: str) -> None:
        content, commit = files.get(path), {"X-Repo-Commit": _commit_of(files)}
        if name in self.hub.gated:
            return self._refuse_gated(name)
        if content is None:
            code = {"X-Error-Code": "EntryNotFound"}
            return self._answer(404, {"error": "Entry not found"}, {**code, **commit})
        headers = {"ETag": f'"{_oid(content)}"', **commit}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, content, "application/octet-stream", headers)
        first, last = int(asked[1]), int(asked[2]) + 1
        headers["Content-Range"] = f"bytes {first}-{last - 1}/{len(content)}"
        return self._send(206, content[first:last], "application/octet-stream", headers)

    def _refuse_gated(self, name: str) -> None:
        self._answer(403, {"error": f"Access to {name} is restricted"}, {"X-Error-Code": "GatedRepo"})

    def _may(self, name: str) -> None:
        if name in self.hub.gated:
            return self._refuse_gated(name)
        return self._answer(200, {})

    def _dataset(self, name: str, revision: str | None) -> dict[str, bytes] | None:
        """A dataset's files; None once it was answered that there are none."""
        files = self.hub.dataset(name, unquote(revision or "main"))
        return self._or_not_found(files, name in self.hub.datasets)

    def _about_dataset(self, name: str, revision: str | None) -> None:
        files = self._dataset(name, revision)
        if files is not None:
            gated = "manual" if name in self.hub.gated else False
            self._answer(200, {"id": name, "sha": _commit_of(files), "gated": gated, "private": False,
                               "siblings": [{"rfilename": path} for path in files]})  # fmt: skip

    def _tree_of_dataset(self, name: str, revision: str, folder: str | None) -> None:
        files = self._dataset(name, revision)
        if files is not None:
            below = f"{folder}/" if folder else ""
            wanted = {path: _listed(path, c) for path, c in files.items() if path.startswith(below)}
            if "recursive=true" not in self.path.lower():
                tops = {path: below + path.removeprefix(below).partition("/")[0] for path in wanted}
                folders = {top: {"type": "directory", "path": top, "size": 0, "oid": "0" * 40}
                           for path, top in tops.items() if top != path}  # fmt: skip
                wanted = {**{p: w for p, w in wanted.items() if tops[p] == p}, **folders}
            self._answer(200, list(wanted.values()))

    def _paths_of_dataset(self, name: str, revision: str) -> None:
        asked = parse_qs(self._body().decode())["paths"]
        files = self._dataset(name, revision)
        if files is not None:
            found = [_listed(path, files[path]) for path in asked if path in files]
            folders = [p for p in asked if any(path.startswith(f"{p}/") for path in files)]
            self._answer(200, [*found, *({"type": "directory", "path": p, "size": 0, "oid": "0" * 40}
                                         for p in folders)])  # fmt: skip

    def _file_of_dataset(self, name: str, revision: str, path: str) -> None:
        files = self._dataset(name, revision)
        if files is not None:
            self._send_file(name, files, path)

    def _answer(self, status: int, about: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(about).encode(), "application/json", headers or {})

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


_NAME = "([^/]+/[^/]+)"
_GET = {
    "/api/whoami-v2": "_whoami",
    f"/api/models/{_NAME}(?:/revision/([^/]+))?": "_about",
    f"/api/models/{_NAME}/tree/([^/]+)(?:/.*)?": "_tree",
    f"/datasets/{_NAME}/resolve/([^/]+)/(.+)": "_file_of_dataset",
    f"/{_NAME}/resolve/([^/]+)/(.+)": "_file",
    f"/api/datasets/{_NAME}(?:/revision/([^/]+))?": "_about_dataset",
    f"/api/datasets/{_NAME}/tree/([^/]+)(?:/(.*))?": "_tree_of_dataset",
    f"/api/datasets/{_NAME}/auth-check": "_may",
}
_POST = {
    "/api/validate-yaml": "_valid",
    "/api/repos/create": "_create",
    f"/api/models/{_NAME}/preupload/([^/]+)": "_preupload",
    f"/api/models/{_NAME}/branch/([^/]+)": "_branch",
    f"/{_NAME}\\.git/info/lfs/objects/batch": "_batch",
    f"/api/models/{_NAME}/commit/([^/]+)": "_commit",
    f"/api/datasets/{_NAME}/paths-info/([^/]+)": "_paths_of_dataset",
}


def _listed(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
