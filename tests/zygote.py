"""Real processes of the program without the seconds that its imports take: an interpreter that has them, and forks.

Every run is a process of its own, with its id, exit status, files, signals and process group, that can be killed.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

from runs import merged

ROOT = Path(__file__).resolve().parent.parent
ANSWER_SECONDS = 120  # the first answer comes after the imports


class Run:
    """A started run; `returncode` as in subprocess, None while it lasts."""

    def __init__(self, zygote: "Zygote", pid: int, log: Path):
        self.zygote, self.pid, self.log = zygote, pid, log
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.zygote.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, 9)
                raise TimeoutError(f"a run took longer than {timeout} s:\n{self.stderr[-3000:]}")
            time.sleep(0.01)
        return self.returncode

    @property
    def stderr(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def stdout(self) -> str:
        return self.log.with_suffix(".out").read_text(errors="replace")


class Zygote:
    """`script`: train_rm, or a module of tests/ that has a `run()` of its own."""

    def __init__(self, script: str = "train_rm"):
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, __file__, script]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.number = 0
        self.ask({"ready": True})

    def ask(self, question: dict):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], ANSWER_SECONDS)[0]:
            self.process.kill()
            raise TimeoutError(f"no answer to {question} in {ANSWER_SECONDS} s")
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"ended with {self.process.wait(timeout=10)} instead of an answer to {question}")
        return json.loads(answer)

    def start(self, argv: list[str], cwd: Path, fault: str = "", **env: str) -> Run:
        """`fault`: Python code that runs before the program, to break something in it."""
        self.number += 1
        log = cwd / f"run-{self.number}.log"
        task = {"argv": merged(argv), "cwd": str(cwd), "log": str(log), "fault": fault, "env": env}
        return Run(self, self.ask(task), log)

    def start_many(self, count: int, argv: list[str], cwd: Path, fault: str = "", **env: str) -> list[Run]:
        """`count` processes of one training, with what torchrun would tell them."""
        if count == 1:
            return [self.start(argv, cwd, fault, **env)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        names = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(count)} for r in range(count)]
        return [self.start(argv, cwd, fault, **names, **rank, **env) for rank in ranks]

    def run(self, count: int, argv: list[str], cwd: Path, fault: str = "", **env: str) -> Run:
        """Start `count` processes and wait for their end, which must be a good one; returns the main one."""
        runs = self.start_many(count, argv, cwd, fault, **env)
        codes = [run.wait() for run in runs]
        assert codes == [0] * count, runs[0].stderr[-3000:]
        return runs[0]

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


def child(task: dict, run) -> None:
    os.chdir(task["cwd"])
    os.environ.update(task["env"])
    for fd, name in ((1, str(Path(task["log"]).with_suffix(".out"))), (2, task["log"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["train_rm.py", *task["argv"]]
    try:
        exec(task["fault"], {"__name__": "fault"})
        sys.exit(run())
    except SystemExit as error:
        if sys.stdout is not None:
            sys.stdout.flush()
        os._exit(error.code or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(script: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background starts without
    run = __import__(script).run
    finish = sys.modules["rm.train.finish"]  # the report takes two seconds: tests/report draw it
    finish.write_report = lambda folder: (folder / "report.html").write_text("-")
    for line in sys.stdin:
        task, answer = json.loads(line), None
        if "ready" in task:
            pass
        elif "poll" in task:
            pid, status = os.waitpid(task["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork() or child(task, run)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
