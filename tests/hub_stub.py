"""A stand-in for the Hugging Face Hub: as much of its API as huggingface_hub needs to make a repository and fill it."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "-".join(["a", "token", "of", "the", "stub"])  # of no form that is known for a secret


class HubStub:
    """A server; what was committed is in `files`, {(repo, revision): {path: bytes}}.

    `trouble`: {pattern of "METHOD /path": a status to answer with, "hang", or "drop" (the connection)}.
    """

    def __init__(self):
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.repos: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.commits: list[str] = []
        self.trouble: dict[str, int | str] = {}
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that gave up
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def env(self, **more: str) -> dict[str, str]:
        """Environment of a program that takes this for the hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN} | more

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "orgs": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            status = 409 if name in self.repos else 200
            self.repos.setdefault(name, asked)
            return status, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/put/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.blobs[match[1]] = body
            return 200, {}
        if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.url}/put/{o['oid']}"}} for o in objects]
            done = [o | {"actions": a} for o, a in zip(objects, actions, strict=True)]
            return 200, {"transfer": "basic", "objects": done}
        if re.fullmatch(r"/api/models/[^/]+(/[^/]+)?", path):
            return 404, {"error": "no such repository"}
        repo, what, revision = re.fullmatch(r"/api/models/([^/]+/[^/]+)/([\w-]+)/([^/]+)", path).groups()
        if repo not in self.repos:
            return 404, {"error": "no such repository"}
        if what == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in asked]
            files = [
                {"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None}
                for p, m in zip(asked, modes, strict=True)
            ]
            return 200, {"files": files}
        if what == "commit":
            files = self.files.setdefault((repo, revision), {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
                else:
                    self.commits.append(value["summary"])
            oid = f"{len(self.commits):040x}"
            return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}"}
        return 200, {"id": repo}  # auth-check, branch, revision

    def _handler(stub):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self):
                body = self._body()
                request = f"{self.command} {self.path}"
                stub.requests.append(request)
                trouble = next((what for p, what in stub.trouble.items() if re.search(p, request)), None)
                if trouble == "hang":
                    stub.closing.wait()
                if trouble in ("hang", "drop"):
                    self.close_connection = True
                    return
                status, answer = (trouble, {"error": "of the stub"}) if trouble else (0, None)
                if not status and not self.path.startswith("/put/"):
                    if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        status, answer = 401, {"error": "Invalid credentials"}
                if not status:
                    status, answer = stub.answer(self.command, self.path.split("?")[0], body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            do_GET = do_POST = do_PUT = do

            def log_message(self, *_):
                pass

        return Handler
