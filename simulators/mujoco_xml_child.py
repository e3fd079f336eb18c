"""The process in which untrusted MuJoCo XML is compiled: a fork server with one short-lived child per model.

Started as a script by `mujoco_xml`; imports neither torch nor this library. A request is a JSON head, its length in
eight bytes before it, then the XML and its assets; the answer is JSON behind its length. Each model is compiled in a
child of its own that can open no file (the limit of descriptors is 0), write none, and has bounded memory and time.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from typing import Any, BinaryIO

HEAD = struct.Struct("<Q")


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the other side closes the pipe."""
    import resource  # noqa: F401

    import mujoco  # noqa: F401  once, before the forks
    import numpy  # noqa: F401

    while (size := requests.read(HEAD.size)) and len(size) == HEAD.size:
        head = json.loads(requests.read(HEAD.unpack(size)[0]))
        xml = requests.read(head["xml"])
        assets = {name: requests.read(length) for name, length in head["assets"]}
        answer = json.dumps(_in_child(xml, assets, head)).encode()
        answers.write(HEAD.pack(len(answer)) + answer)
        answers.flush()


def _in_child(xml: bytes, assets: dict[str, bytes], limits: dict[str, Any]) -> dict[str, Any]:
    """What compiling found, or how the child ended instead."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            _limit(limits)
            os.write(writer, json.dumps(_compile(xml.decode(), assets, limits)).encode())
            code = 0
        except MemoryError:
            os.write(writer, b'{"ended": "memory"}')
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    deadline, parts, late = time.monotonic() + limits["seconds"], [], False
    os.set_blocking(reader, False)
    while not late:
        try:
            part = os.read(reader, 1 << 16)
        except BlockingIOError:
            time.sleep(0.002)
            late = time.monotonic() > deadline
            continue
        if not part:
            break
        parts.append(part)
    os.close(reader)
    if late:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return {"ended": "time"}
    if os.WIFSIGNALED(status):
        return {"ended": "signal", "signal": signal.Signals(os.WTERMSIG(status)).name}
    if not parts:
        return {"ended": "exit", "code": os.WEXITSTATUS(status)}
    found: dict[str, Any] = json.loads(b"".join(parts))
    return found


def _limit(limits: dict[str, Any]) -> None:
    """No files, no core dump, bounded memory and processor time; whatever MuJoCo prints is dropped."""
    import resource  # not on Windows, where the parent refuses before it starts this

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    with open("/proc/self/statm") if os.path.exists("/proc/self/statm") else open(os.devnull) as file:
        used = int((file.read().split() or ["0"])[0]) * resource.getpagesize()
    memory = used + limits["memory"]
    seconds = int(limits["seconds"]) + 1
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _compile(xml: str, assets: dict[str, bytes], limits: dict[str, Any]) -> dict[str, Any]:
    """Compile, take one step; "error", "odd" (an array that is not finite) or "large", or the sizes of the model."""
    import mujoco
    import numpy as np

    try:
        model = mujoco.MjModel.from_xml_string(xml, assets)
        if model.narena > limits["memory"]:
            return {"large": f"the arena takes {model.narena} bytes"}
        for name in dir(model):
            value = None if name.startswith("_") else getattr(model, name)
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                return {"odd": name}
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        if not np.isfinite(data.qacc).all():
            return {"odd": "qacc, the first acceleration"}
    except (ValueError, mujoco.FatalError) as error:
        return {"error": str(error)}
    return {"nq": model.nq, "nv": model.nv, "nu": model.nu}


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    serve(sys.stdin.buffer, sys.stdout.buffer)
