"""A stand-in for the Hugging Face Hub: the requests that huggingface_hub makes to send and fetch models.

It keeps everything in memory. Files ending in .safetensors take the way of large files: an upload by itself,
and a download through a redirect to another path.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


class Hub(ThreadingHTTPServer):
    """The server and all that it knows.

    Attributes:
        repos: for each repository, the files of each commit, in order.
        private: repositories that are hidden without the token.
        asked: "METHOD path" of every request.
        cut: path of a file whose downloads end after half of its bytes, or "".
        refuse: status with which the next commit is refused, or 0.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cut, self.refuse = "", 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repo: str) -> dict[str, bytes]:
        """Return the files of the last commit."""
        return list(self.repos[repo].values())[-1]

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.repos[repo]), sorted(files.items()))).encode()).hexdigest()
        self.repos[repo][sha] = files
        self.blobs |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        return sha

    def find(self, repo: str, revision: str) -> str | None:
        commits = self.repos[repo]
        return list(commits)[-1] if revision == "main" else revision if revision in commits else None


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub in a thread."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json")

    def fail(self, status: int, code: str, message: str = "") -> None:
        self.send(status, X_Error_Code=code, X_Error_Message=message)

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                function(self, body, *match.groups())
                return
        self.fail(404, "", f"no such page: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def readable(self, repo: str, revision: str = "main") -> str | None:
        """Return the commit to read, or answer as the Hub does where there is none."""
        if repo not in self.server.repos or (repo in self.server.private and not self.allowed()):
            self.fail(404 if self.allowed() else 401, "RepoNotFound")
            return None
        sha = self.server.find(repo, revision)
        if sha is None:
            self.fail(404, "RevisionNotFound")
        return sha

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if not self.allowed():
            self.fail(401, "", "Invalid username or password.")
        elif asked["organization"] != "user":
            self.fail(403, "", "You don't have the rights to create a model under this namespace")
        elif repo in self.server.repos:
            error = {"error": "You already created this model repo", "url": f"{self.server.endpoint}/{repo}"}
            self.answer(error, 409)
        else:
            self.server.repos[repo] = {}
            self.server.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
            if asked.get("visibility") == "private" or asked.get("private"):
                self.server.private.add(repo)
            self.answer({"url": f"{self.server.endpoint}/{repo}", "name": repo, "id": repo})

    def validate(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if self.readable(repo, revision):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]
            self.answer({"files": files})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.endpoint}/storage/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.send(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self.allowed():
            self.fail(401, "", "Invalid credentials in Authorization header")
        elif self.server.refuse:
            status, self.server.refuse = self.server.refuse, 0
            self.fail(status, "", "the disk is full")
        else:
            self.add(body, repo)

    def add(self, body: bytes, repo: str) -> None:
        files = dict(self.server.files(repo))
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = self.server.commit(repo, files)
        self.answer({"commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}", "commitOid": sha})

    def info(self, body: bytes, repo: str, revision: str | None) -> None:
        if sha := self.readable(repo, revision or "main"):
            files = self.server.repos[repo][sha]
            self.answer({"id": repo, "sha": sha, "siblings": [{"rfilename": name} for name in files]})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        if sha := self.readable(repo, revision):
            entries: list[dict[str, Any]] = []
            for name, content in self.server.repos[repo][sha].items():
                entry = {"type": "file", "path": name, "size": len(content), "oid": _etag(name, content)}
                if name.endswith(".safetensors"):
                    oid = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"size": len(content), "oid": oid, "pointerSize": 130}
                entries.append(entry)
            self.answer(entries)

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        if sha := self.readable(repo, revision):
            content = self.server.repos[repo][sha][name]
            headers = {"X_Repo_Commit": sha, "ETag": f'"{_etag(name, content)}"'}
            if name.endswith(".safetensors"):
                oid = hashlib.sha256(content).hexdigest()
                linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(content))}
                # huggingface_hub follows a redirect to the same host by itself.
                location = f"http://localhost:{self.server.server_port}/storage/{oid}/{name}"
                self.send(302, **headers, **linked, Location=location)
            else:
                self.content(name, content, headers)

    def stored(self, body: bytes, oid: str, name: str) -> None:
        self.content(name, self.server.blobs[oid], {"ETag": f'"{oid}"'})

    def content(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        begin = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = content[int(begin[1]) :] if begin else content
        if begin:
            headers["Content_Range"] = f"bytes {begin[1]}-{len(content) - 1}/{len(content)}"
        if self.command == "GET" and name == self.server.cut:
            self.send_response(206 if begin else 200)
            for key, value in {**headers, "Content-Length": str(len(part))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(b"" if begin else content[: len(content) // 2])
            self.close_connection = True
            return
        self.send(206 if begin else 200, part, **headers)


def _etag(name: str, content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Any]] = [
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("POST",), rf"/api/models/{_REPO}/preupload/([^/]+)", _Handler.preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/storage/(\w+)", _Handler.store),
    (("POST",), rf"/api/models/{_REPO}/commit/([^/]+)", _Handler.commit),
    (("GET",), rf"/api/models/{_REPO}(?:/revision/([^/]+))?", _Handler.info),
    (("GET",), rf"/api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    (("GET", "HEAD"), r"/storage/(\w+)/(.+)", _Handler.stored),
]
