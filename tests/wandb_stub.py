"""A stand-in for W&B's server, enough for runs and for a sweep agent: it accepts everything and remembers it."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Stub:
    """`trials` are handed to an agent one after the other, then it is told to exit. A `status` other than 200 refuses
    every request; `garbage` answers each with what is no JSON; `hang` leaves them unanswered. After `lives` requests
    it is gone, if that is not None."""

    def __init__(self, trials=(), sweep: str = "", status: int = 200, garbage: bool = False, lives: int | None = None):
        self.trials, self.issued, self.sweep, self.status = list(trials), 0, sweep, status
        self.garbage, self.lives = garbage, lives
        self.hang = threading.Event()  # set: do not answer
        self.runs: dict[str, dict] = {}  # run id → what was said about it last
        self.history: dict[str, list[dict]] = {}  # run id → lines
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # clients hang up
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.hang.clear()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: dict) -> dict:
        if path.endswith("/file_stream"):
            run = path.split("/")[-2]
            content = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history.setdefault(run, []).extend(map(json.loads, content))
            return {"exitcode": None, "limits": {}}
        return {"data": self.graphql(body.get("query", ""), body.get("variables") or {})}

    def graphql(self, query: str, variables: dict) -> dict:
        if "upsertBucket" in query:
            run = variables["name"]
            new = run not in self.runs
            self.runs.setdefault(run, {}).update({k: v for k, v in variables.items() if v is not None})
            project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "me"}}
            bucket = {"id": run, "name": run, "displayName": run, "description": "", "config": None, "project": project}
            bucket |= {"sweepName": variables.get("sweep"), "historyLineCount": 0}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "createAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "agentHeartbeat" in query:
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(self.commands(variables))}}
        if "sweep(" in query:
            sweep = {"id": "s", "name": "s", "method": "random", "state": "RUNNING", "config": self.sweep}
            sweep["runs"] = {"edges": []}
            return {"project": {"id": "p", "name": "p", "entity": {"name": "me"}, "sweep": sweep}}
        if "viewer" in query:
            viewer = {"id": "u", "username": "me", "entity": "me", "admin": False, "flags": "{}"}
            return {"viewer": viewer | {"teams": {"edges": []}, "apiKeys": {"edges": []}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables.get("files", [])]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "query ArtifactType" in query:
            return {"project": {"artifact": None}}
        if "createArtifact(" in query:
            sequence = {"id": "q", "latestArtifact": {"id": "a", "versionIndex": 0}}
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}
        return {}

    def commands(self, variables: dict) -> list[dict]:
        if json.loads(variables["runState"]):  # a trial is running
            return []
        if not self.trials:
            return [{"type": "exit"}]
        args = {name: {"value": value} for name, value in self.trials.pop(0).items()}
        run = f"trial{self.issued}"
        self.issued += 1
        return [{"type": "run", "id": run, "run_id": run, "program": "train_rm.py", "args": args}]

    def _handler(stub):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if stub.lives is not None:
                    stub.lives -= 1
                    if stub.lives < 0:
                        self.close_connection = True
                        threading.Thread(target=stub.close, daemon=True).start()
                        return
                while stub.hang.is_set():
                    threading.Event().wait(0.05)
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if self.path == "/start-hanging":
                    stub.hang.set()
                is_json = self.command == "POST" and body.startswith(b"{")
                answer = stub.answer(self.path, json.loads(body)) if is_json and stub.status == 200 else {}
                data = b"<html>{" if stub.garbage else json.dumps(answer).encode()
                self.send_response(stub.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do

            def log_message(self, *_):
                pass

        return Handler
