"""A stand-in for the Hugging Face hub on 127.0.0.1: repositories in memory, and what goes wrong.

It speaks the part of the protocol that huggingface_hub and `datasets` use: a repository's
description, its tree, HEAD and GET of a file at a commit; and for uploads creating repositories and
branches, checking a card, the upload modes, git LFS's basic transfer, and the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

Files = dict[str, bytes]
_LARGE = (".safetensors",)
_MODEL_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass
class Repository:
    """Commits (id -> file -> content) and the branches that stand at them."""

    commits: dict[str, Files]
    main: str
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, revision: str) -> str | None:
        found = self.main if revision == "main" else self.branches.get(revision, revision)
        return found if found in self.commits else None


@dataclass
class Hub:
    """The repositories by kind and name, as in "models/me/sql", and what is wrong with the hub."""

    repositories: dict[str, Repository]
    token: str = "hf_secret"
    """What is asked for where something is written, or a private repository read."""
    cut: bool = False
    """Downloads break off in the middle."""
    refuse: dict[str, int] = field(default_factory=dict)
    """Parts of paths that are answered with this status."""
    port: int = 0
    served: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    """What came by git LFS, by SHA-256."""
    spoil: bool = False
    """What is uploaded is stored with a flipped bit."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, reachable at `hub.address` within the block."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def connected(hub: Hub, home: Path, *, token: str | None = None) -> Iterator[Hub]:
    """The hub as huggingface_hub's own in this process, with its cache in `home`."""
    from huggingface_hub import constants

    with serving(hub), pytest.MonkeyPatch.context() as patch:
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "ENDPOINT", hub.address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        yield hub


def files_of(folder: Path) -> Files:
    """A folder's files as a commit."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""

    def _answer(self) -> None:
        path = urllib.parse.unquote(self.path).partition("?")[0]
        self.state.served.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        for part, status in self.state.refuse.items():
            if part in path:
                return self._send(status, b"{}", {"Content-Type": "application/json"})
        if self.command in ("GET", "HEAD"):
            return self._read(path)
        if self.headers.get("Authorization") != f"Bearer {self.state.token}" and (
            not path.startswith(("/objects/", "/api/validate-yaml"))
        ):
            return self._send(401, b"{}", {"Content-Type": "application/json"})
        return self._written(path, body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _read(self, path: str) -> None:
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"(?:/(datasets))?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            kind, name, what, rest = api.groups()
        elif file:
            (kind, name), what, rest = file.groups()[:2], "file", file[3]
        else:
            return self._missing("RepoNotFound")
        repository = self.state.repositories.get(f"{kind or 'models'}/{name}")
        known = self.headers.get("Authorization") == f"Bearer {self.state.token}"
        if repository is None or (repository.private and not known):
            return self._missing("RepoNotFound")
        if repository.gated and not known:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        revision, _, folder = (rest or "main").partition("/") if what == "tree" else (rest, "", "")
        commit = repository.commit(revision or "main")
        if commit is None:
            return self._missing("RevisionNotFound")
        files = repository.commits[commit]
        if what == "file" and file:
            return self._file(commit, files.get(file[4]))
        if what == "tree":
            return self._missing("EntryNotFound") if folder else self._json(_tree(files))
        names = [{"rfilename": one} for one in files]
        return self._json({"id": name, "sha": commit, "siblings": names})

    def _file(self, commit: str, body: bytes | None) -> None:
        if body is None:
            return self._missing("EntryNotFound")
        headers = {"ETag": f'"{blob_id(body)}"', "X-Repo-Commit": commit}
        return self._send(200, body, headers, cut=self.state.cut)

    def _written(self, path: str, body: bytes) -> None:
        if path.startswith("/objects/"):
            oid = path.removeprefix("/objects/")
            assert hashlib.sha256(body).hexdigest() == oid
            spoilt = body[:-1] + bytes([body[-1] ^ 1])
            self.state.objects[oid] = spoilt if self.state.spoil else body
            return self._send(200, b"", {})
        if path == "/api/validate-yaml":
            return self._json(_card_faults(json.loads(body)["content"]))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path)
        repository = self.state.repositories.get(f"models/{found[1]}") if found else None
        if found is None or repository is None:
            return self._missing("RepoNotFound")
        if found[2] == "branch":
            repository.branches.setdefault(found[3], repository.main)
            return self._json({})
        if repository.commit(found[3]) is None:
            return self._missing("RevisionNotFound")
        if found[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [
                {"path": name, "uploadMode": "lfs" if name.endswith(_LARGE) else "regular"}
                for name in names
            ]
            return self._json({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        return self._commit(found[1], repository, found[3], body)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        key = f"models/{name}"
        if key in self.state.repositories:
            answer = json.dumps({"url": f"{self.state.address}/{name}"}).encode()
            return self._send(409, answer, {"Content-Type": "application/json"})
        first = hashlib.sha1(key.encode()).hexdigest()
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.state.repositories[key] = Repository(
            {first: {".gitattributes": b"*.safetensors filter=lfs\n"}}, first, private=private
        )
        return self._json({"url": f"{self.state.address}/{name}"})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                "actions": {"upload": {"href": f"{self.state.address}/objects/{one['oid']}"}},
            }
            for one in wanted["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, revision: str, body: bytes) -> None:
        files = dict(repository.commits[str(repository.commit(revision))])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(body).hexdigest()
        repository.commits[commit] = files
        if revision == "main":
            repository.main = commit
        else:
            repository.branches[revision] = commit
        url = f"{self.state.address}/{name}/commit/{commit}"
        self._json({"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code, "Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


def blob_id(body: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def _tree(files: Files) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name, body in files.items():
        entry = {"type": "file", "path": name, "size": len(body), "oid": blob_id(body)}
        if name.endswith(_LARGE):
            oid = hashlib.sha256(body).hexdigest()
            entry["lfs"] = {"oid": oid, "size": len(body), "pointerSize": 130}
        entries.append(entry)
    return entries


def _card_faults(card: str) -> dict[str, Any]:
    """The hub's verdict on a card's front matter: what it knows of the fields is checked."""
    front = card.split("---\n")[1]
    values = yaml.safe_load(front)
    errors = []
    base = values.get("base_model")
    if base is not None and not (isinstance(base, str) and _MODEL_ID.fullmatch(base)):
        errors.append({"message": '"base_model" is not a valid model id'})
    if not re.fullmatch(r"[a-z0-9.-]+", values.get("license", "mit")):
        errors.append({"message": '"license" is not one of those known'})
    return {"errors": errors, "warnings": []}
