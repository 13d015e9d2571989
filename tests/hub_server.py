"""A hub of models on this machine: as much of the Hugging Face hub's interface as pushing and loading use.

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
from urllib.parse import unquote

TOKEN = "hf_of_someone_who_may_write"


class Hub:
    """What the hub holds."""

    def __init__(self) -> None:
        self.url = ""
        self.models: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        """Large files, by their SHA-256."""

    def commit(self, name: str) -> str:
        """What stands for the state that a model is in."""
        listed = sorted((path, hashlib.sha1(c).hexdigest()) for path, c in self.models[name].items())
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
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
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

    def _valid(self) -> None:
        self._body()
        self._answer(200, {"errors": [], "warnings": []})

    def _preupload(self, name: str) -> None:
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

    def _commit(self, name: str) -> None:
        files = self.hub.models[name]
        for line in map(json.loads, self._body().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.commit(name)
        url = f"{self._url(name)}/commit/{commit}"
        self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _about(self, name: str, revision: str | None) -> None:
        if name not in self.hub.models:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", self.hub.commit(name)):
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path} for path in self.hub.models[name]]
        about = {"id": name, "modelId": name, "sha": self.hub.commit(name), "siblings": siblings,
                 "private": name in self.hub.private, "tags": [], "downloads": 0}  # fmt: skip
        return self._answer(200, about)

    def _tree(self, name: str) -> None:
        files = self.hub.models[name].items()
        self._answer(200, [{"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
                           for path, content in files])  # fmt: skip

    def _file(self, name: str, path: str) -> None:
        content = self.hub.models.get(name, {}).get(path)
        if content is None:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": self.hub.commit(name)}
        return self._send(200, content, "application/octet-stream", headers)

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
    f"/api/models/{_NAME}(?:/revision/([^/]+))?": "_about",
    f"/api/models/{_NAME}/tree/[^/]+(?:/.*)?": "_tree",
    f"/{_NAME}/resolve/[^/]+/(.+)": "_file",
}
_POST = {
    "/api/validate-yaml": "_valid",
    "/api/repos/create": "_create",
    f"/api/models/{_NAME}/preupload/[^/]+": "_preupload",
    f"/{_NAME}\\.git/info/lfs/objects/batch": "_batch",
    f"/api/models/{_NAME}/commit/[^/]+": "_commit",
}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
