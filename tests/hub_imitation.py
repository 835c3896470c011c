"""A small imitation of the hub's HTTP API on loopback, which stores what it receives: repositories, LFS, commits.

It answers the requests that `huggingface_hub` makes to push a model without xet (HF_HUB_DISABLE_XET=1), and fails where
a test asks for it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "abcDEF1234" * 3 + "wxyz"
PART = 4096
"""Bytes of a part; objects of more than two are sent in parts."""


@dataclass
class Hub:
    """Its state, and the failures that are asked of it.

    Attributes:
        cards: front matter of a model's card, by repository.
        files: by repository and revision, the content by path.
        refuse: path prefix -> (status, X-Error-Message) that it is answered with.
        spared: how many transfers of LFS content arrive before any is cut.
        drops: how many are cut in the middle then; -1 = all.
        requests: method and path of all that came in.
        authorized: those of them that carried the token.
    """

    url: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    spared: int = 0
    drops: int = 0
    commits: int = 0
    requests: list[str] = field(default_factory=list)
    authorized: list[str] = field(default_factory=list)


@contextmanager
def imitation() -> Iterator[Hub]:
    """A hub on a free port of loopback."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing: a test's output is its own."""

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        hub, path = self.state, self.path.partition("?")[0]
        hub.requests.append(f"{method} {path}")
        if method == "PUT" and hub.spared:
            hub.spared -= 1
        elif method == "PUT" and hub.drops:
            hub.drops -= hub.drops > 0
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.connection.close()
            self.close_connection = True
            return
        body = self._body()
        storage = path.startswith("/storage/")  # signed addresses, which take no token
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if authorized:
            hub.authorized.append(f"{method} {path}")
        refused = next((answer for prefix, answer in hub.refuse.items() if path.startswith(prefix)), None)
        if refused is not None:
            self._answer(refused[0], {"error": refused[1]}, {"X-Error-Message": refused[1]})
        elif not authorized and not storage:
            text = "Invalid credentials in Authorization header"
            self._answer(401, {"error": text}, {"X-Error-Message": text})
        elif storage:
            self._storage(method, path, body)
        else:
            self._api(method, path, body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _api(self, method: str, path: str, body: bytes) -> None:
        hub = self.state
        if path == "/api/whoami-v2":
            return self._answer(200, {"name": "me", "type": "user"})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if path.startswith("/storage-verify/"):
            return self._answer(200, {})
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repository = f"{owner}/{name}"
        if repository not in hub.private:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if method == "GET":
            info = {"id": repository, "private": hub.private[repository], "sha": "0" * 40, "siblings": [], "tags": []}
            return self._answer(200, info | {"cardData": hub.cards.get(repository)})
        verb, revision = rest[0], "/".join(rest[1:])
        if verb == "branch":
            hub.files.setdefault((repository, revision), {})
            return self._answer(200, {})
        stored = hub.files.get((repository, revision))
        if stored is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if verb == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                | ({"oid": _oid(file["path"], stored[file["path"]])} if file["path"] in stored else {})
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": modes})
        assert verb == "commit", path
        return self._commit(repository, revision, stored, body)

    def _create(self, asked: dict[str, Any]) -> None:
        repository = f"{asked['organization'] or 'me'}/{asked['name']}"
        known = repository in self.state.private
        if not known:
            self.state.private[repository] = asked.get("visibility") == "private"
            self.state.files[repository, "main"] = {}
        self._answer(409 if known else 200, {"url": f"{self.state.url}/{repository}"})

    def _batch(self, asked: dict[str, Any]) -> None:
        found = []
        for each in asked["objects"]:
            oid, size, url = each["oid"], each["size"], self.state.url
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.state.objects:
                upload: dict[str, Any] = {"href": f"{url}/storage/{oid}?X-Signature=signed-for-one-hour"}
                if size > 2 * PART:
                    parts = range(1, -(-size // PART) + 1)
                    upload["header"] = {"chunk_size": str(PART)} | {str(n): f"{url}/storage/{oid}/{n}" for n in parts}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{url}/storage-verify/{oid}"}}
            found.append(answer)
        self._answer(200, {"transfer": "basic", "objects": found})

    def _storage(self, method: str, path: str, body: bytes) -> None:
        oid, *number = path.removeprefix("/storage/").split("/")
        if number:
            self.state.parts[oid, int(number[0])] = body
            return self._answer(200, {}, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        if method == "POST":  # the parts are complete
            order = [part["partNumber"] for part in json.loads(body)["parts"]]
            body = b"".join(self.state.parts[oid, number] for number in order)
        assert hashlib.sha256(body).hexdigest() == oid, "what arrived is not what was announced"
        self.state.objects[oid] = body
        return self._answer(200, {})

    def _commit(self, repository: str, revision: str, stored: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                stored[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                stored[value["path"]] = self.state.objects[value["oid"]]
            else:
                assert line["key"] == "header", line["key"]
        self.state.commits += 1
        oid = f"{self.state.commits:040x}"
        self._answer(200, {"commitUrl": f"{self.state.url}/{repository}/commit/{oid}", "commitOid": oid})


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def _oid(path: str, content: bytes) -> str:
    """As the hub tells it: sha256 of what lies in LFS, git's sha1 of other files."""
    if _mode(path) == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
