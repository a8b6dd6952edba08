"""A Hub on loopback, for the real client: repositories, branches, LFS uploads, downloads, rights.

Without Xet: the client must run with HF_HUB_DISABLE_XET=1 and takes LFS over HTTP.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants

LARGE = re.compile(r".*\.(safetensors|gguf|bin)")
SIGNATURE = "5ecre7"  # of addresses that need no token, as those of a storage provider


@dataclass
class Repository:
    """Files (name: SHA-256 of the content) by commit, and commits by branch."""

    commits: dict = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict = field(default_factory=lambda: {"main": "0" * 40})
    private: bool = False
    gated: bool = False

    def commit(self, branch, files):
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files.items())}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision):
        """Commit of a revision; None if there is none."""
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


class Server(ThreadingHTTPServer):
    """What the Hub knows, what it was asked, and how it is to fail.

    Attributes:
      tokens: rights (``write`` or ``read``) by token; the account is ``me``.
      blobs: contents by SHA-256.
      asked: paths in the order of the requests; log: with their method.
      stored: names (SHA-256, or part of it) of what was uploaded whole.
      part_bytes: uploads above are asked for in parts of this size.
      most_bytes: larger files are refused.
      during: called with the path once half a large file was sent or received; if it gives true,
        the connection is cut.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.blobs, self.tokens = {}, {}, {}
        self.asked, self.log, self.stored = [], [], []
        self.part_bytes = self.most_bytes = 1 << 40
        self.during = lambda path: False
        self.lock = threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):  # a client that was killed
        pass

    def keep(self, data):
        sha = hashlib.sha256(data).hexdigest()
        self.blobs[sha] = data
        return sha

    def publish(self, name, files):
        """Make a repository of files (name: bytes)."""
        repository = self.repositories.setdefault(name, Repository())
        repository.commit("main", {path: self.keep(data) for path, data in files.items()})
        return repository

    def files(self, name, branch="main"):
        """Contents by name."""
        repository = self.repositories[name]
        found = repository.commits[repository.branches[branch]]
        return {path: self.blobs[sha] for path, sha in found.items()}


class Cut(Exception):
    """The connection is to be closed."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        url = urlsplit(self.path)
        path, self.query = url.path, parse_qs(url.query)
        with self.server.lock:
            self.server.asked.append(path)
            self.server.log.append(f"{self.command} {path}")
        try:
            body = self.body(path)
            for pattern, method, needs in ROUTES:
                if found := re.fullmatch(pattern, path):
                    groups = tuple(unquote(group or "") for group in found.groups())
                    return self.allowed(groups, needs) and method(self, body, *groups)
            self.refuse(404, "", f"no route {self.command} {path}")
        except (Cut, OSError):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(2)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def body(self, path):
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        size = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(size // 2)
        if self.command == "PUT" and self.server.during(path):
            raise Cut
        data += self.rfile.read(size - size // 2)
        if len(data) < size:
            raise Cut
        return data

    def allowed(self, groups, needs):
        """Whether the token may do this; else it is answered why not."""
        if needs == "signature":
            if self.query.get("sig") == [SIGNATURE]:
                return True
            return self.refuse(403, "", "no valid signature")
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        right = self.server.tokens.get(given)
        if given and not right:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        repository = self.server.repositories.get(groups[0]) if groups else None
        if repository and repository.gated and not right:
            return self.refuse(401, "GatedRepo", "Access to model is restricted")
        if needs == "read" and repository and (right or not repository.private):
            return True
        if needs == "read" or (groups and repository is None):
            code = 404 if right else 401
            return self.refuse(code, "RepoNotFound", "Repository not found")
        if not right:
            return self.refuse(401, "", "Invalid username or password.")
        if right != "write" or (groups and not groups[0].startswith("me/")):
            return self.refuse(403, "", "Forbidden: you must use a write token")
        return True

    def send(self, body, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status = headers.pop("status", 200)
        self.send_response(status)
        for key, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if len(data) > 4096:
            self.wfile.write(data[: len(data) // 2])
            if self.server.during(urlsplit(self.path).path):
                raise Cut
            data = data[len(data) // 2 :]
        self.wfile.write(data)

    def refuse(self, code, name, message):
        headers = {"X_Error_Code": name} if name else {}
        self.send({"error": message}, status=code, X_Error_Message=message, **headers)

    # What is asked.

    def validate_yaml(self, body):
        self.send({"errors": [], "warnings": []})

    def create(self, body):
        asked = json.loads(body)
        owner = asked.get("organization") or "me"
        name = f"{owner}/{asked['name']}"
        if owner != "me":
            return self.refuse(403, "", "You don't have the rights to create a model there")
        url = {"url": f"{self.server.address}/{name}", "name": name, "id": name}
        if name in self.server.repositories:
            return self.send({"error": "You already created this model repo", **url}, status=409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        made = self.server.publish(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        made.private = private
        self.send(url)

    def revision(self, repository, revision):
        oid = self.server.repositories[repository].find(revision or "main")
        if oid is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        return oid

    def entries(self, repository, oid):
        for path, sha in sorted(self.server.repositories[repository].commits[oid].items()):
            data = self.server.blobs[sha]
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data, path)}
            if LARGE.fullmatch(path):
                entry["lfs"] = {"oid": sha, "size": len(data), "pointerSize": 130}
            yield entry

    def info(self, body, name, revision):
        if oid := self.revision(name, revision):
            repository = self.server.repositories[name]
            siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
            self.send({
                "id": name, "modelId": name, "sha": oid, "private": repository.private,
                "siblings": siblings, "gated": False, "downloads": 0, "likes": 0, "tags": [],
            })  # fmt: skip

    def tree(self, body, name, revision):
        if oid := self.revision(name, revision):
            self.send(list(self.entries(name, oid)))

    def paths_info(self, body, name, revision):
        if oid := self.revision(name, revision):
            form = json.loads(body) if body[:1] == b"{" else parse_qs(body.decode())
            self.send([e for e in self.entries(name, oid) if e["path"] in form.get("paths", ())])

    def refs(self, body, name):
        branches = self.server.repositories[name].branches.items()
        named = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in branches]
        self.send({"branches": named, "tags": [], "converts": []})

    def branch(self, body, name, branch):
        branches = self.server.repositories[name].branches
        if branch in branches:
            return self.refuse(409, "", "Reference already exists")
        branches[branch] = branches["main"]
        self.send({})

    def preupload(self, body, name, revision):
        if oid := self.revision(name, revision):
            there = {e["path"]: e.get("lfs", e)["oid"] for e in self.entries(name, oid)}
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if LARGE.fullmatch(path) else "regular" for path in asked}
            self.send({"files": [
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there.get(path)}
                for path, mode in modes.items()
            ]})  # fmt: skip

    def batch(self, body, name):
        answers = []
        for wanted in json.loads(body)["objects"]:
            sha, size = wanted["oid"], wanted["size"]
            answer = {"oid": sha, "size": size}
            place = f"{self.server.address}/lfs/{sha}"
            step = self.server.part_bytes
            if size > self.server.most_bytes:
                answer["error"] = {"code": 422, "message": f"{size} bytes are too many for a file"}
            elif sha not in self.server.blobs:
                upload = {"href": f"{place}?sig={SIGNATURE}"}
                if size > step:
                    parts = range(-(-size // step))
                    header = {f"{i + 1:05d}": f"{place}/{i}?sig={SIGNATURE}" for i in parts}
                    upload = {
                        "href": f"{place}/whole?sig={SIGNATURE}",
                        "header": {"chunk_size": str(step), **header},
                    }
                answer["actions"] = {"upload": upload}
            answers.append(answer)
        self.send(
            {"transfer": "basic", "objects": answers}, Content_Type="application/vnd.git-lfs+json"
        )

    def store(self, body, sha, part):
        if part == "whole":
            asked = json.loads(body)
            names = [f"{sha}/{int(found['partNumber']) - 1}" for found in asked["parts"]]
            body = b"".join(self.server.blobs.pop(name) for name in names)
        elif part:
            self.server.blobs[f"{sha}/{part}"] = body
        if not part or part == "whole":
            if hashlib.sha256(body).hexdigest() != sha:
                return self.refuse(400, "", "another checksum")
            self.server.keep(body)
        with self.server.lock:
            self.server.stored.append(f"{sha}/{part}" if part else sha)
        self.send({}, ETag=f'"{len(body)}"')

    def commit(self, body, name, revision):
        if not (oid := self.revision(name, revision)):
            return
        repository = self.server.repositories[name]
        files = dict(repository.commits[oid])
        for line in body.splitlines():
            key, value = (json.loads(line)[part] for part in ("key", "value"))
            if key == "file":
                files[value["path"]] = self.server.keep(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    return self.refuse(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del files[value["path"]]
        request = "create_pr" in self.query
        made = repository.commit("refs/pr/1" if request else revision, files)
        url = f"{self.server.address}/{name}"
        self.send({
            "success": True, "commitOid": made, "commitUrl": f"{url}/commit/{made}",
            "hookOutput": "", **({"pullRequestUrl": f"{url}/discussions/1"} if request else {}),
        })  # fmt: skip

    def resolve(self, body, name, revision, path):
        oid = self.revision(name, revision)
        if oid is None:
            return
        sha = self.server.repositories[name].commits[oid].get(path)
        if sha is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = self.server.blobs[sha]
        headers = {"ETag": f'"{sha}"', "X_Repo_Commit": oid, "Accept_Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), int(wanted[2] or len(data) - 1) + 1
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            headers["status"], data = 206, data[start:stop]
        self.send(data, **headers)


def git_oid(data, path):
    """What git calls a file: of a large one, its pointer's name."""
    if LARGE.fullmatch(path):
        sha = hashlib.sha256(data).hexdigest()
        data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(data)}\n"
        data = data.encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


ID = r"([^/]+/[^/]+)"
MODEL = rf"/api/(?:models|datasets)/{ID}"
ROUTES = (
    ("/api/validate-yaml", Handler.validate_yaml, "write"),
    ("/api/repos/create", Handler.create, "write"),
    (rf"{MODEL}/tree/([^/]+)", Handler.tree, "read"),
    (rf"{MODEL}/paths-info/([^/]+)", Handler.paths_info, "read"),
    (rf"{MODEL}/refs", Handler.refs, "read"),
    (rf"{MODEL}/branch/([^/]+)", Handler.branch, "write"),
    (rf"{MODEL}/preupload/([^/]+)", Handler.preupload, "write"),
    (rf"{MODEL}/commit/([^/]+)", Handler.commit, "write"),
    (rf"{MODEL}(?:/revision/([^/]+))?", Handler.info, "read"),
    (rf"/{ID}\.git/info/lfs/objects/batch", Handler.batch, "write"),
    (r"/lfs/([0-9a-f]{64})(?:/(\w+))?", Handler.store, "signature"),
    (rf"/(?:datasets/)?{ID}/resolve/([^/]+)/(.+)", Handler.resolve, "read"),
)


def start(directory: Path | None = None, token: str = "") -> Server:
    """Serve; a directory as ``me/tiny``, which is gated if a token is given that may read it."""
    server = Server()
    if directory:
        files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        server.publish("me/tiny", files).gated = bool(token)
    if token:
        server.tokens[token] = "read"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def connect(server: Server, cache: Path, monkeypatch, token: str = "") -> None:
    """Have the client in this process talk to a server, and nothing of this machine's account."""
    point(server.address, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", token)


def point(address: str, monkeypatch) -> None:
    """Have the client in this process talk to an address."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
