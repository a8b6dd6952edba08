"""A Hub on loopback that serves one model's files to the real client."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "1" * 40


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.split("?")[0]
        server = self.server
        server.asked.append(path)
        if server.token and self.headers.get("Authorization") != f"Bearer {server.token}":
            return self.refuse(401, "GatedRepo", "Access to model is restricted")
        if path.startswith("/api/models/me/tiny/revision/"):
            revision = path.rsplit("/", 1)[1]
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound", "no such revision")
            files = sorted(file.name for file in server.directory.iterdir())
            siblings = [{"rfilename": name} for name in files]
            body = {"id": "me/tiny", "modelId": "me/tiny", "sha": COMMIT, "siblings": siblings,
                    "private": False, "downloads": 0, "likes": 0, "tags": []}  # fmt: skip
            return self.send(json.dumps(body).encode())
        if path.startswith("/api/models/me/tiny/tree/"):
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "2" * 40}
                for f in sorted(server.directory.iterdir())
            ]
            return self.send(json.dumps(entries).encode())
        if path.startswith("/me/tiny/resolve/"):
            file = server.directory / path.rsplit("/", 1)[1]
            if file.exists():
                return self.send(file.read_bytes(), file=True)
            return self.refuse(404, "EntryNotFound", "no such file")
        return self.refuse(404, "RepoNotFound", "no such repository")

    def send(self, body, *, file=False):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/octet-stream" if file else "application/json")
        if file:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, code, name, message):
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def start(directory: Path, token: str = "") -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.directory, server.token, server.asked = directory, token, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server
