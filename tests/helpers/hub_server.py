"""A Hugging Face Hub on loopback: the part of its HTTP API that the real client needs to publish and to load models.

There are two servers, as at the Hub: the API with the regular files, and a store for large files at another origin, without
tokens. Everything is in memory. ``hub.requests`` lists all requests; ``hub.fail`` makes the next ones fail, ``hub.cut`` ends
the connection in the middle of a body.

    with HubServer() as hub:
        hub.url, hub.tokens["hf_writer"] == "writer"
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt")


class Stored(NamedTuple):
    """A file of a commit."""

    content: bytes
    large: bool

    @property
    def etag(self) -> str:
        """The ETag, as at the Hub: sha256 of a large file, git's hash of a regular one."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """A repository: commits (name -> files), and the branches and tags that point to them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Stored]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, Stored], branch: str = "main") -> str:
        listed = {path: stored.etag for path, stored in sorted(files.items())}
        name = hashlib.sha1(json.dumps([len(self.commits), listed]).encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs[branch] = name
        return name

    def find(self, revision: str) -> str | None:
        revision = self.refs.get(revision, revision)
        return revision if revision in self.commits else None


class Request(NamedTuple):
    """A client's request."""

    server: str  # "hub" | "store"
    method: str
    path: str
    headers: dict[str, str]
    status: int

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Fault:
    """A planned fault: an answer with a status, or (``after``) a body that ends after this number of bytes."""

    pattern: re.Pattern[str]
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    after: int = -1


class Refused(Exception):
    """An answer with a status other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "", **body: str) -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


class HubServer:
    """The server, as a context manager. Users and their tokens are in ``tokens``."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.tokens = {"hf_writer": "writer", "hf_reader": "reader"}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._servers = [self._start(HubHandler), self._start(StoreHandler)]
        self.url, self.store_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def _start(self, handler: type[Handler]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(self, pattern: str, status: int, times: int = 1 << 30, **headers: str) -> None:
        """Answer requests with a matching ``METHOD path`` with a status. Header names have _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(re.compile(pattern), times, status=status, headers=named))

    def cut(self, pattern: str, after: int, times: int = 1) -> None:
        """Close the connection after this number of bytes of the body."""
        self.faults.append(Fault(re.compile(pattern), times, after=after))

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.pattern.search(request):
                    fault.times -= 1
                    return fault
        return None

    def asked(self, pattern: str) -> list[Request]:
        """Return the requests so far with a matching ``METHOD path``."""
        return [request for request in self.requests if re.search(pattern, str(request))]


class Handler(BaseHTTPRequestHandler):
    """The common part of both handlers: keep-alive, no log on the terminal, faults."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    kind = "hub"
    _fault: Fault | None = None

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            self.body = self._chunks()
        else:
            self.body = self.rfile.read(length)
        self._fault = self.hub.take_fault(f"{self.command} {self.path}")
        try:
            if self._fault is not None and self._fault.status:
                self.send(self._fault.status, b'{"error": "made up"}', headers=self._fault.headers)
            else:
                with self.hub.lock:
                    answer = self.answer()
                self.send(*answer)
        except Refused as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            body = json.dumps({"error": refusal.message, **refusal.body}).encode()
            self.send(refusal.status, body, headers={name: value for name, value in headers.items() if value})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self) -> tuple[int, bytes, Mapping[str, str]]:
        raise NotImplementedError

    def send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.hub.requests.append(Request(self.kind, self.command, self.path, dict(self.headers), status))
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._fault is not None and self._fault.after >= 0:
            self.wfile.write(body[: self._fault.after])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)

    def content(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, bytes, Mapping[str, str]]:
        """Send a file or the requested range of it."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return 200, body, {"Accept-Ranges": "bytes", **headers}
        start, end = int(asked[1]), int(asked[2] or len(body) - 1)
        if start >= len(body):
            raise Refused(416, message="range")
        return 206, body[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(body)}", **headers}


class StoreHandler(Handler):
    """The store of large files, by sha256. A client must not send it a token."""

    kind = "store"

    def answer(self) -> tuple[int, bytes, Mapping[str, str]]:
        name = urlsplit(self.path).path.strip("/")
        if self.command == "PUT":
            if hashlib.sha256(self.body).hexdigest() != name:
                raise Refused(400, message="another checksum")
            self.hub.large[name] = self.body
            return 200, b"", {}
        if name not in self.hub.large:
            raise Refused(404, message="no such object")
        return self.content(self.hub.large[name], {"ETag": f'"{name}"'})


class HubHandler(Handler):
    """The server of the API and the regular files."""

    def answer(self) -> tuple[int, bytes, Mapping[str, str]]:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = url.path
        routes = (
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate),
            (r"/api/whoami-v2", self.who),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self.commit),
            (r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", self.branch),
            (r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", self.tag),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", self.tree),
            (r"/api/models/([^/]+/[^/]+)/refs", self.list_refs),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self.info),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        )
        for pattern, method in routes:
            if found := re.fullmatch(pattern, path):
                groups = (unquote(group) if group else "" for group in found.groups())
                result = method(*groups)
                return result if isinstance(result, tuple) else (200, json.dumps(result).encode(), {})
        raise Refused(404, message=f"no such page: {path}")

    # -- permissions -- -----------------------------------------------------------------------------------------------------

    def user(self) -> str | None:
        sent = self.headers.get("Authorization")
        if not sent:
            return None
        user = self.hub.tokens.get(sent.removeprefix("Bearer "))
        if user is None:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return user

    def read(self, repo_id: str) -> Repository:
        repository, user = self.hub.repositories.get(repo_id), self.user()
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if repository.gated and user != repo_id.split("/")[0]:
            raise Refused(403 if user else 401, "GatedRepo", f"Access to model {repo_id} is restricted")
        return repository

    def write(self, repo_id: str) -> Repository:
        repository = self.read(repo_id)
        if self.user() is None:
            raise Refused(401, message="Invalid username or password.")
        if self.user() != repo_id.split("/")[0]:
            raise Refused(403, message="you must use a write token")
        return repository

    def revision(self, repository: Repository, revision: str) -> str:
        found = repository.find(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # -- the API ------------------------------------------------------------------------------------------------------------

    def who(self) -> dict[str, Any]:
        return {"name": self.user(), "type": "user"}

    def create(self) -> dict[str, Any]:
        asked, user = json.loads(self.body), self.user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        owner = asked.get("organization") or user
        if owner != user:
            raise Refused(403, message=f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f"{owner}/{asked['name']}"
        if repo_id in self.hub.repositories:
            raise Refused(409, message="You already created this model repo", url=f"{self.hub.url}/{repo_id}")
        repository = Repository(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repository.commit({".gitattributes": Stored(b"*.safetensors filter=lfs\n", False)})
        self.hub.repositories[repo_id] = repository
        return {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}

    def validate(self) -> dict[str, Any]:
        content = json.loads(self.body)["content"]
        if not re.match(r"---\n.*?\n---\n", content, re.DOTALL):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        return {"errors": [], "warnings": []}

    def preupload(self, repo_id: str, revision: str) -> dict[str, Any]:
        repository = self.write(repo_id)
        present = repository.commits[self.revision(repository, revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            path, old = file["path"], present.get(file["path"])
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": old.etag if old else None})
        return {"files": answers}

    def batch(self, repo_id: str) -> dict[str, Any]:
        self.write(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large:
                found["actions"] = {"upload": {"href": f"{self.hub.store_url}/{wanted['oid']}", "header": {}}}
            objects.append(found)
        return {"transfer": "basic", "objects": objects}

    def commit(self, repo_id: str, revision: str) -> dict[str, Any]:
        repository = self.write(repo_id)
        parent = self.revision(repository, revision)
        files = dict(repository.commits[parent])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit") not in (None, parent):
                raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            if entry["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refused(400, message="the large file was not uploaded")
                files[value["path"]] = Stored(self.hub.large[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        pull_request = self.query.get("create_pr") == ["1"]
        branch = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repository.refs)}" if pull_request else revision
        name = repository.commit(files, branch)
        url = f"{self.hub.url}/{repo_id}/commit/{name}"
        return {"commitUrl": url, "commitOid": name, "pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/1"}

    def branch(self, repo_id: str, name: str) -> dict[str, Any]:
        repository = self.write(repo_id)
        if name in repository.refs:
            raise Refused(409, message=f"Reference already exists: {name}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.refs[name] = self.revision(repository, start)
        return {}

    def tag(self, repo_id: str, revision: str) -> dict[str, Any]:
        repository = self.write(repo_id)
        repository.refs[json.loads(self.body)["tag"]] = self.revision(repository, revision)
        return {}

    def info(self, repo_id: str, revision: str) -> dict[str, Any]:
        repository = self.read(repo_id)
        name = self.revision(repository, revision or "main")
        files = [{"rfilename": path} for path in sorted(repository.commits[name])]
        return {"id": repo_id, "modelId": repo_id, "sha": name, "private": repository.private, "siblings": files, "tags": []}

    def list_refs(self, repo_id: str) -> dict[str, Any]:
        refs = self.read(repo_id).refs.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in refs]
        return {"branches": branches, "tags": [], "converts": []}

    def tree(self, repo_id: str, revision: str) -> tuple[int, bytes, Mapping[str, str]]:
        repository = self.read(repo_id)
        files = repository.commits[self.revision(repository, revision)]
        rows = [{"type": "file", "path": path, "size": len(f.content), "oid": f.etag} for path, f in sorted(files.items())]
        return 200, json.dumps(rows).encode(), {}

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple[int, bytes, Mapping[str, str]]:
        repository = self.read(repo_id)
        name = self.revision(repository, revision)
        stored = repository.commits[name].get(path)
        if stored is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": name, "ETag": f'"{stored.etag}"'}
        if not stored.large:
            return self.content(stored.content, headers)
        location = f"{self.hub.store_url}/{stored.etag}?signature=made-up"
        linked = {"X-Linked-Etag": f'"{stored.etag}"', "X-Linked-Size": str(len(stored.content))}
        return 302, b"", {"Location": location, "X-Repo-Commit": name, **linked}
