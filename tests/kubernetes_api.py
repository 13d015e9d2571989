"""A small API server that kubectl talks to: it keeps objects, and lets a test say how they are.

What it is handed is held against the published schemas (of kubernetes-validate for Kubernetes' own kinds, of
Kubeflow's client packages for theirs), unknown fields included.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import yaml
from kubeflow.training import ApiClient
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

_VERSION = "1.37"
_KINDS = {
    "Service": ("", "v1", "services"), "Pod": ("", "v1", "pods"), "Node": ("", "v1", "nodes"),
    "Job": ("batch", "v1", "jobs"), "PyTorchJob": ("kubeflow.org", "v1", "pytorchjobs"),
    "TrainJob": ("trainer.kubeflow.org", "v1alpha1", "trainjobs"),
    "SelfSubjectAccessReview": ("authorization.k8s.io", "v1", "selfsubjectaccessreviews"),
}  # fmt: skip
_NO_SCHEMA = b"\x0a\x032.0\x12\x06\x0a\x01a\x12\x01b\x42\x00"
"""An OpenAPI document without any kind, as protobuf: what a kubectl before 1.27 checks manifests by."""
_OF_CLUSTER = {"Node", "SelfSubjectAccessReview"}


def check(manifest: dict[str, Any]) -> None:
    """Raises where a manifest is not what its kind's schema has."""
    kind = manifest["kind"]
    if kind == "TrainJob":
        known = TrainerV1alpha1TrainJob.from_dict(manifest)
        assert known is not None
        assert _plain(known.to_dict()) == manifest
        pod = manifest["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"][
            "replicatedJobs"
        ]
        _check_pod({**pod[0]["template"]["spec"]["template"]["spec"]}, image=False)
    elif kind == "PyTorchJob":
        client = ApiClient()
        known = client.deserialize(SimpleNamespace(data=json.dumps(manifest)), "KubeflowOrgV1PyTorchJob")
        assert client.sanitize_for_serialization(known) == manifest
        for replica in manifest["spec"]["pytorchReplicaSpecs"].values():
            _check_pod(replica["template"]["spec"], image=True)
    else:
        kubernetes_validate.validate(manifest, _VERSION, strict=True)


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """What the kubelet makes of an argument or variable, as in `third_party/forked/golang/expansion`."""

    def replaced(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replaced, text)


def _check_pod(spec: dict[str, Any], *, image: bool) -> None:
    containers = spec["containers"] if image else [{"image": "patched", **c} for c in spec["containers"]]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "a"},
        "spec": {**spec, "containers": containers},
    }
    kubernetes_validate.validate(pod, _VERSION, strict=True)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


class Api:
    """A cluster for kubectl; `config` is what KUBECONFIG names."""

    def __init__(self, folder: Path) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        """By kind and name."""
        self.allowed = True
        self.logs: dict[str, str] = {}
        """What the pods have written, by name."""
        self.calls: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.config = folder / "kubeconfig"
        where = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.config.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": where}}],
            "users": [{"name": "me", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "me"}}],
        }))  # fmt: skip

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [found for (known, _), found in self.objects.items() if known == kind]

    def add_pod(self, name: str, labels: dict[str, str], written: str, state: str = "running") -> None:
        container = {"name": "train", "image": "a"}
        known = {**container, "imageID": "a", "ready": True, "restartCount": 0, "state": {state: {}}}
        about = {"name": name, "namespace": "default", "labels": labels}
        self.objects["Pod", name] = {
            "apiVersion": "v1", "kind": "Pod", "metadata": about,
            "spec": {"containers": [container]},
            "status": {"phase": "Running", "containerStatuses": [known]},
        }  # fmt: skip
        self.logs[name] = written

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        parts = path.strip("/").split("/")
        about = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups()},
            "/version": {"major": "1", "minor": "37", "gitVersion": "v1.37.0"},
        }
        if path in about:
            return 200, about[path]
        if path == "/openapi/v2":
            return 200, _NO_SCHEMA
        if path.startswith("/openapi/v3"):
            return 200, _openapi(path.removeprefix("/openapi/v3").strip("/"))
        if parts in (["api", "v1"], *(["apis", group, version] for group, version, _ in _KINDS.values())):
            return 200, _resources(parts)
        if parts[-1] == "log":
            return 200, self.logs[parts[-2]]
        return self._on_objects(method, [p for p in parts if p], query, body)

    def _on_objects(
        self, method: str, parts: list[str], query: dict[str, list[str]], body: Any
    ) -> tuple[int, Any]:
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        rest = rest[2:] if rest[:1] == ["namespaces"] and len(rest) > 2 else rest
        kind = next((k for k, (_, _, plural) in _KINDS.items() if rest and plural == rest[0]), None)
        if kind is None:
            return 404, _status(404, "NotFound")
        if kind == "SelfSubjectAccessReview":
            said = {"spec": {}, "status": {"allowed": self.allowed}}
            return 201, {"kind": kind, "apiVersion": "authorization.k8s.io/v1", **said}
        if method == "POST":
            check(body)
            body["metadata"] = {"namespace": "default", **body["metadata"], "uid": str(uuid.uuid4())}
            self.objects[kind, body["metadata"]["name"]] = body
            return 201, body
        if len(rest) > 1:
            found = self.objects.get((kind, rest[1]))
            if found is None:
                return 404, _status(404, "NotFound")
            if method == "DELETE":
                del self.objects[kind, rest[1]]
                self._delete_owned_by(found)
            if method == "PATCH":  # as a merge patch of metadata
                found["metadata"] |= body["metadata"]
            return 200, found
        wanted = dict(pair.split("=") for pair in query.get("labelSelector", [""])[0].split(",") if pair)
        items = [o for o in self.of_kind(kind) if wanted.items() <= o["metadata"].get("labels", {}).items()]
        if method == "DELETE":
            self.objects = {k: o for k, o in self.objects.items() if o not in items}
        group, version, _ = _KINDS[kind]
        return 200, {
            "kind": f"{kind}List",
            "apiVersion": f"{group}/{version}".strip("/"),
            "metadata": {},
            "items": items,
        }

    def _delete_owned_by(self, owner: dict[str, Any]) -> None:
        """As a cluster's garbage collector does."""
        self.objects = {
            key: found
            for key, found in self.objects.items()
            if owner["metadata"].get("uid", "") not in _owners(found)
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """Nothing is logged."""

            def _do(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                given = self.rfile.read(length)
                body = json.loads(given) if given.startswith(b"{") else None  # or kubectl's protobuf
                url = urlsplit(self.path)
                api.calls.append(f"{self.command} {url.path}")
                try:
                    code, answer = api.answer(self.command, url.path, parse_qs(url.query), body)
                except Exception as error:  # which the test is to see in what kubectl says
                    code, answer = 422, _status(422, "Invalid", str(error))
                content = answer if isinstance(answer, bytes) else _encoded(answer)
                self.send_response(code)
                self.send_header("Content-Type", _TYPES.get(type(answer), "application/json"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        for method in ("GET", "POST", "DELETE", "PATCH"):
            setattr(Handler, f"do_{method}", Handler._do)

        return Handler


def _owners(found: dict[str, Any]) -> set[str]:
    return {owner["uid"] for owner in found["metadata"].get("ownerReferences", [])}


_TYPES = {str: "text/plain", bytes: "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"}


def _encoded(answer: Any) -> bytes:
    return (answer if isinstance(answer, str) else json.dumps(answer)).encode()


def _groups() -> list[dict[str, Any]]:
    pairs = sorted({(group, version) for group, version, _ in _KINDS.values() if group})
    return [
        {"name": g, "versions": [{"groupVersion": f"{g}/{v}", "version": v}],
         "preferredVersion": {"groupVersion": f"{g}/{v}", "version": v}} for g, v in pairs
    ]  # fmt: skip


def _resources(parts: list[str]) -> dict[str, Any]:
    group = "" if parts[0] == "api" else parts[1]
    return {
        "kind": "APIResourceList", "groupVersion": f"{group}/{parts[-1]}".strip("/"),
        "resources": [
            {"name": plural, "singularName": kind.lower(), "kind": kind,
             "namespaced": kind not in _OF_CLUSTER,
             "verbs": ["create", "delete", "get", "list", "patch", "deletecollection"]}
            for kind, (g, _, plural) in _KINDS.items() if g == group
        ],
    }  # fmt: skip


def _openapi(path: str) -> dict[str, Any]:
    """Says that this server checks fields itself, as servers do since Kubernetes 1.27."""
    groups = {f"apis/{g}/{v}" if g else f"api/{v}" for g, v, _ in _KINDS.values()}
    if not path:
        return {"paths": {group: {"serverRelativeURL": f"/openapi/v3/{group}"} for group in groups}}
    made = {}
    for kind, (group, version, plural) in _KINDS.items():
        if path == (f"apis/{group}/{version}" if group else f"api/{version}"):
            made[f"/{path}/namespaces/{{namespace}}/{plural}/{{name}}"] = {
                "patch": {
                    "parameters": [{"name": "fieldValidation", "in": "query"}],
                    "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
                    "responses": {},
                }
            }
    return {"openapi": "3.0.0", "info": {"title": "test", "version": _VERSION}, "paths": made}


def _status(code: int, reason: str, message: str = "") -> dict[str, Any]:
    return {
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
        "message": message or reason,
    }  # fmt: skip
