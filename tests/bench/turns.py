"""Contenders in processes of their own that work in turn, so that all see the same machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


class Turn:
    """The worker's end of the pipe: says that a piece of work is done, on stdout, waits for the next word, on stdin."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever the program prints goes to the log
        self.tokens, self.pairs, self.note = 0, 0, {}  # since the last wait

    def wait(self) -> None:
        done = {"tokens": self.tokens, "pairs": self.pairs}
        print(json.dumps(done | self.note), file=self.out, flush=True)
        self.tokens = self.pairs = 0
        if not sys.stdin.readline():
            os._exit(0)


class Contender:
    """The controller's end: a process that runs `script --worker name --arguments JSON` under `python`."""

    def __init__(self, name: str, python: str, script: str, arguments: dict, log: Path):
        self.name, self.log = name, log
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.pairs: list[int] = []
        command = [python, script, "--worker", name, "--arguments", json.dumps(arguments)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, stderr=log.open("w"), **pipes)
        self._listen()

    def _listen(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} died; its log ends:\n" + "\n".join(self.log.read_text().splitlines()[-15:]))
        return json.loads(line)

    def work(self, count: bool = True) -> dict:
        """Let it do one piece of work; returns what it says of it, with the `seconds` it took."""
        began = time.perf_counter()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        said = self._listen()
        said["seconds"] = time.perf_counter() - began
        if count:
            self.seconds.append(said["seconds"])
            self.tokens.append(said["tokens"])
            self.pairs.append(said["pairs"])
        return said

    def peak_memory_gb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / 1e9 for line in status if line.startswith("VmHWM"))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
