"""A stand-in for the Hugging Face hub on 127.0.0.1: one data set, and what goes wrong with it.

It speaks the part of the protocol that `datasets` uses for a repository of plain files: the
repository's description, its tree, and HEAD and GET of a file at a commit.
"""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = "me/pairs"


@dataclass
class Hub:
    """The data set's commits (revision -> file -> content), and whether downloads break off."""

    commits: dict[str, dict[str, bytes]]
    main: str
    cut: bool = False
    port: int = 0
    served: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, revision: str) -> str | None:
        found = self.main if revision == "main" else revision
        return found if found in self.commits else None


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, reachable at `hub.address` within the block."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path).partition("?")[0]
        self.state.served.append(f"{self.command} {path}")
        api, files = f"/api/datasets/{NAME}", f"/datasets/{NAME}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            self._describe(path.removeprefix(api).removeprefix("/revision/") or "main")
        elif path.startswith(f"{api}/tree/"):
            self._list(*path.removeprefix(f"{api}/tree/").split("/", 1))
        elif path.startswith(files):
            self._file(*path.removeprefix(files).split("/", 1))
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET

    def _describe(self, revision: str) -> None:
        commit = self.state.commit(revision)
        if commit is None:
            return self._missing("RevisionNotFound")
        names = [{"rfilename": name} for name in self.state.commits[commit]]
        return self._json({"id": NAME, "sha": commit, "private": False, "siblings": names})

    def _list(self, revision: str, folder: str = "") -> None:
        commit = self.state.commit(revision)
        if commit is None or folder:
            return self._missing("EntryNotFound")
        files = self.state.commits[commit].items()
        return self._json(
            [
                {"type": "file", "path": name, "size": len(body), "oid": _tag(body)}
                for name, body in files
            ]
        )

    def _file(self, revision: str, name: str) -> None:
        commit = self.state.commit(revision)
        body = self.state.commits[commit].get(name) if commit else None
        if body is None:
            return self._missing("EntryNotFound" if commit else "RevisionNotFound")
        headers = {"ETag": f'"{_tag(body)}"', "X-Repo-Commit": str(commit)}
        return self._send(200, body, headers, cut=self.state.cut)

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


def _tag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
