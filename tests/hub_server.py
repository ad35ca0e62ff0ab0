"""A stand-in for the Hub: the part of its HTTP interface that huggingface_hub uses for files, in a thread.

It answers with the headers, statuses and error codes that huggingface_hub looks at. Large files are kept apart and
reached by a redirect to another address, as on the Hub. `as_the_hub` points this process at a server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import pytest

TOKEN = "hf_of_the_tests"
_LARGE = ".safetensors"  # kept apart, as .gitattributes of a new repository says
_NOWHERE = "http://127.0.0.1:9"  # nobody listens on the port for discarding


@dataclass
class Repo:
    """A repository of models.

    Attributes:
        commits: the files of each.
        branches: and tags, with their commits.
        access: ``open``, ``private`` or ``gated``; for the last two one needs the token.
    """

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    access: str = "open"

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit with these files beside the older ones."""
        whole = {**self.files(branch), **files}
        told = repr((branch, len(self.commits), sorted(whole.items()))).encode()
        sha = hashlib.sha1(told).hexdigest()
        self.commits[sha], self.branches[branch] = whole, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits.get(self.branches.get(revision, revision), {})


@dataclass
class Hub:
    """The server and all that it has and was asked.

    Attributes:
        url: of the server.
        repos: by ``user/repo``.
        asked: method and path of every request.
        received: the body of every request.
        large: what was uploaded apart, by SHA-256.
        writable: whether the token may write.
        before_commit: called once, before the next commit is accepted.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    writable: bool = True
    before_commit: Any = None

    @property
    def storage(self) -> str:
        """Another host for large files, which is sent no token."""
        return self.url.replace("127.0.0.1", "localhost")

    def new(self, name: str, files: dict[str, bytes] | None = None, access: str = "open") -> Repo:
        self.repos[name] = Repo(access=access)
        self.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})})
        return self.repos[name]

    def downloads(self, file: str) -> int:
        """How often the content of a file was sent."""
        return sum(method == "GET" and path.startswith("/cdn/") and file in path for method, path in self.asked)


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_the_hub(
    monkeypatch: pytest.MonkeyPatch, url: str, home: Path, *, token: str | None = None, offline: bool = False
) -> None:
    """Let huggingface_hub of this process use this server, a cache of its own, and no login but this one."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)


def environment(url: str, home: Path, token: str | None = None, *, offline: bool = False) -> dict[str, str]:
    """The same for another process."""
    told = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1" if offline else "0"}
    told |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_CACHE": str(home / "hub")}
    return told if token is None else told | {"HF_TOKEN": token}


def nowhere() -> str:
    """An address at which nobody answers."""
    return _NOWHERE


class _Handler(BaseHTTPRequestHandler):
    """One request; what it asks for is in `ROUTES`."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append((self.command, path))
        self.hub.received.append(body)
        for method, pattern, answer in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                answer(self, body, *match.groups())
                return
        self.answer(404, {"error": f"no such route: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _any  # noqa: N815

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def repo(self, name: str) -> Repo | None:
        """A repository that this user may see; otherwise the refusal is sent."""
        known, repo = self.headers.get("Authorization") == f"Bearer {TOKEN}", self.hub.repos.get(name)
        if self.headers.get("Authorization") and not known:
            self.answer(401, {"error": "no"}, X_Error_Message="Invalid credentials in Authorization header")
        elif repo is None or (repo.access == "private" and not known):
            self.refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        elif repo.access == "gated" and not known:
            self.refuse(401, "GatedRepo", f"Access to model {name} is restricted. You must have access to it.")
        elif repo.access == "disabled":
            self.answer(403, {"error": "no"}, X_Error_Message="Access to this resource is disabled.")
        elif repo.access == "broken":
            self.answer(500, {"error": "Internal Error"})
        else:
            return repo
        return None

    def commit_of(self, repo: Repo, revision: str) -> str | None:
        sha = repo.branches.get(revision, revision)
        if sha in repo.commits:
            return sha
        self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def resolve(self, body: bytes, name: str, rest: str) -> None:
        if (repo := self.repo(name)) is None:
            return
        revision, file = _split(repo, rest)
        if (sha := self.commit_of(repo, revision)) is None:
            return
        if file not in repo.commits[sha]:
            self.answer(404, {"error": "no"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        content = repo.commits[sha][file]
        if not file.endswith(_LARGE):
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=sha)
            return
        digest = hashlib.sha256(content).hexdigest()
        self.hub.large[digest] = content
        linked = {"X_Linked_Etag": f'"{digest}"', "X_Linked_Size": str(len(content)), "X_Repo_Commit": sha}
        self.answer(302, b"", Location=f"{self.hub.storage}/cdn/{digest}?file={file}", **linked)

    def cdn(self, body: bytes, digest: str) -> None:
        assert "Authorization" not in self.headers
        self.hub.asked[-1] = (self.command, f"/cdn/{parse_qs(urlsplit(self.path).query)['file'][0]}")
        self.answer(200, self.hub.large[digest])

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        repo = self.repo(name)
        sha = None if repo is None else self.commit_of(repo, revision or "main")
        if repo is not None and sha is not None:
            siblings = [{"rfilename": file} for file in repo.commits[sha]]
            private = repo.access == "private"
            self.answer(200, {"id": name, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def writes(self) -> bool:
        """Whether this user may write; otherwise the refusal is sent."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "no"}, X_Error_Message="Invalid credentials in Authorization header")
        elif not self.hub.writable:
            self.answer(403, {"error": "no"}, X_Error_Message="You don't have the rights to create a model here")
        return self.hub.writable and self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def create(self, body: bytes) -> None:
        if not self.writes():
            return
        told = json.loads(body)
        name = f"{told.get('organization') or 'me'}/{told['name']}"
        private = told.get("visibility") == "private" or told.get("private") is True
        if name in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.new(name, access="private" if private else "open")
        self.answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        repo = self.repo(name) if self.writes() else None
        if repo is None or self.commit_of(repo, revision) is None:
            return
        modes = [(f["path"], "lfs" if f["path"].endswith(_LARGE) else "regular") for f in json.loads(body)["files"]]
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]
        self.answer(200, {"files": files, "commitOid": repo.branches[revision]})

    def batch(self, body: bytes, name: str) -> None:
        found = [
            {
                "oid": one["oid"],
                "size": one["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/apart/{one['oid']}", "header": {}}},
            }
            for one in json.loads(body)["objects"]
        ]
        self.answer(200, {"objects": found, "transfer": "basic"})

    def apart(self, body: bytes, digest: str) -> None:
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.large[digest] = body
        self.answer(200, b"")

    def commit(self, body: bytes, name: str, revision: str) -> None:
        repo = self.repo(name) if self.writes() else None
        if repo is None:
            return
        if self.hub.before_commit is not None:
            self.hub.before_commit, call = None, self.hub.before_commit
            call()
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent is not None and parent != repo.branches[revision]:
            self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        files = {}
        for line in lines[1:]:
            told = line["value"]
            apart = line["key"] == "lfsFile"
            files[told["path"]] = self.hub.large[told["oid"]] if apart else base64.b64decode(told["content"])
        sha = repo.commit(files, revision)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def _split(repo: Repo, rest: str) -> tuple[str, str]:
    """Revision and file; a branch may have slashes in its name."""
    known = [name for name in repo.branches if rest.startswith(f"{name}/")]
    revision = max(known, key=len, default=rest.partition("/")[0])
    return revision, rest[len(revision) + 1 :]


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("HEAD", rf"/{_NAME}/resolve/(.+)", _Handler.resolve),
    ("GET", rf"/{_NAME}/resolve/(.+)", _Handler.resolve),
    ("GET", r"/cdn/(\w+)", _Handler.cdn),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/apart/(\w+)", _Handler.apart),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
)
