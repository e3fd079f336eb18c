"""Runs `sim2real` commands in forked children and kills them: imports are paid once. Used by test_kill9.py.

One JSON request per line on standard input: {"words": [...], "kill_after": seconds or null, "kill_at": n or null};
one JSON answer per line: {"code": exit code, "signal": n or 0, "seconds": wall time}. `kill_at` = n kills the child in
the middle of its n-th flush to disk or renaming of a file: before odd ones happen, after even ones have.
"""

import itertools
import json
import os
import signal
import sys
import time

import torch
import torch._dynamo
import torch.export
import torch.fx.experimental.symbolic_shapes

import sim2real.commands
import sim2real.policy_export
import sim2real.tables
import sim2real.tune_command  # noqa: F401
from sim2real.cli import main


def die_at(n: int) -> None:
    """Replace `os.fsync` and `os.replace` so that the process dies at the n-th call of either."""
    count = itertools.count(1)
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def call(*arguments: object, original: object = original) -> None:
            number = next(count)
            if number == n and n % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*arguments)  # type: ignore[operator]
            if number == n:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, call)


def child(request: dict[str, object]) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if request.get("kill_at"):
        die_at(int(str(request["kill_at"])))
    os._exit(main(list(request["words"])))  # type: ignore[call-overload]


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            try:
                child(request)
            finally:
                os._exit(70)
        if request.get("kill_after") is not None:
            time.sleep(request["kill_after"])
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
        sys.stdout.write(json.dumps({"code": code, "signal": killed, "seconds": time.perf_counter() - start}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
