"""A stand-in for the Hugging Face Hub: a small server on 127.0.0.1 with made-up repositories.

It answers what huggingface_hub asks when it fetches a model: the model's info and its tree, and
its files, the large ones by a redirect to another host name, as the Hub does it. It keeps a list
of the requests, so that a test can tell which bytes were fetched. `hub` is the pytest fixture:

    def test_it(hub):
        commit = hub.push("org/name", {"config.json": b"{}", "model.safetensors": weights})
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_stand_in"
LFS = (".safetensors", ".bin", ".gguf", ".onnx", ".pt", ".h5")
ID = r"(?P<id>[^/]+(?:/[^/]+)?)"
API = re.compile(rf"/api/models/{ID}(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
RESOLVE = re.compile(rf"/(?P<cdn>cdn/)?{ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class Request(NamedTuple):
    """A request that was answered: `sent` is the length of the body, in bytes."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int
    token: str | None


@dataclass
class Repo:
    """Commits by hash, each file name -> bytes, and the names that point to them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


class Hub:
    """The server. Set `status` to answer everything with it, `ignores_ranges` to send whole
    files, `delay` to wait that many seconds before each answer."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.status: int | None = None
        self.ignores_ranges = False
        self.delay = 0.0
        self.hang_ups = 0  # answers that a client didn't read to their end
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Stop listening: connections are refused from now on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def push(self, repo_id: str, files: Mapping[str, bytes] | Path, *, branch: str = "main") -> str:
        """Commit `files`, given as bytes by name or as a folder. Returns the commit's hash."""
        if isinstance(files, Path):
            found = (path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        digests = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())
        commit = hashlib.sha1(json.dumps([repo_id, branch, digests]).encode()).hexdigest()
        repo = self.repos.setdefault(repo_id, Repo())
        repo.commits[commit] = dict(files)
        repo.refs[branch] = commit
        return commit

    def fetched(self, suffix: str = ".safetensors") -> list[Request]:
        """The requests that sent bytes of files whose names end in `suffix`."""
        return [r for r in self.requests if r.path.endswith(suffix) and r.sent and r.status < 300]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each body waits 40 ms for its headers' receipt

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: stderr is the test's."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        time.sleep(self.hub.delay)
        path = urlsplit(self.path).path
        if self.hub.status is not None:
            return self.refuse(self.hub.status, None, "out of order")
        match = API.fullmatch(path) or RESOLVE.fullmatch(path)
        if match is None:
            return self.refuse(404, None, "no such page")
        asked = {key: unquote(value) for key, value in match.groupdict().items() if value}
        repo = self.hub.repos.get(asked["id"])
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known and "cdn" not in asked):
            return self.refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        revision = asked.get("revision", "main")
        commit = revision if revision in repo.commits else repo.refs.get(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if "file" not in asked:
            return self.describe(asked["id"], repo, commit, tree=asked.get("what") == "tree")
        if "cdn" not in asked and repo.gated and not known:
            return self.refuse(403, "GatedRepo", "Access to this model is restricted")
        if asked["file"] not in repo.commits[commit]:
            return self.refuse(404, "EntryNotFound", "Entry not found", commit)
        return self.file(repo.commits[commit][asked["file"]], asked, commit)

    def describe(self, repo_id: str, repo: Repo, commit: str, *, tree: bool) -> None:
        files = []
        for name, data in repo.commits[commit].items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data)}
            entry["oid"] = entry["blobId"] = hashlib.sha1(data).hexdigest()
            if name.endswith(LFS):
                sha = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": sha, "sha256": sha, "size": len(data), "pointerSize": 130}
            files.append({**entry, "rfilename": name})
        if tree:
            return self.answer(200, {}, json.dumps(files).encode())
        info: dict[str, Any] = {
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "siblings": files,
            "tags": [],
        }
        info |= {"private": repo.private, "gated": "auto" if repo.gated else False}
        return self.answer(200, {}, json.dumps(info).encode())

    def file(self, data: bytes, asked: Mapping[str, str], commit: str) -> None:
        lfs = asked["file"].endswith(LFS)
        digest = hashlib.sha256(data) if lfs else hashlib.sha1(data)
        headers = {"ETag": f'"{digest.hexdigest()}"', "Accept-Ranges": "bytes"}
        if "cdn" not in asked:
            headers["X-Repo-Commit"] = commit
            if lfs:  # another name of this machine stands for the content delivery network
                there = f"http://localhost:{self.hub.port}/cdn{urlsplit(self.path).path}"
                headers |= {"Location": there, "X-Linked-Size": str(len(data))}
                headers["X-Linked-Etag"] = headers["ETag"]
                return self.answer(302, headers, b"")
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None or self.hub.ignores_ranges:
            return self.answer(200, headers, data)
        start, stop = int(span[1]), int(span[2] or len(data)) + 1
        part = data[start:stop]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        return self.answer(206, headers, part)

    def refuse(self, status: int, code: str | None, why: str, commit: str | None = None) -> None:
        headers = {"X-Error-Message": why}
        headers |= {"X-Error-Code": code} if code else {}
        headers |= {"X-Repo-Commit": commit} if commit else {}
        self.answer(status, headers, json.dumps({"error": why}).encode())

    def answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        sent = 0 if self.command == "HEAD" else len(body)
        given, path = self.headers, urlsplit(self.path).path
        self.hub.requests.append(
            Request(self.command, path, given["Range"], status, sent, given["Authorization"])
        )
        try:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[:sent])
        except ConnectionError:
            self.hub.hang_ups += 1
            self.close_connection = True


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running stand-in with no repositories, and an empty cache, for this process and for those
    that it starts. huggingface_hub reads the environment as it is imported, hence both."""
    import huggingface_hub
    from huggingface_hub import constants

    server = Hub()
    home = tmp_path / "huggingface"
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    for name in ("http_proxy", "https_proxy", "all_proxy", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_HOME", str(home))
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()  # it may hold a proxy of before
    yield server
    huggingface_hub.close_session()
    server.close()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set HF_HUB_OFFLINE, for this process and for those that it starts."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
