"""MuJoCo XML from anywhere: read, checked and compiled in a child process before this one touches it.

1. The XML and every file it names are read here, once, from inside one folder; a scan refuses what has no place in
   a model (entities, plugins, URLs, NaN, absurd counts) with the line it stands on.
2. The same bytes are compiled in a child that can open no file and has little time and memory (`mujoco_xml_child`).
3. Only what survives there is compiled here, from the same bytes.

A model that you trust needs none of this: pass a `mujoco.MjSpec` instead of a path.
"""

from __future__ import annotations

import json
import os
import re
import select
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mujoco

from sim2real.simulators import mujoco_xml_child
from sim2real.simulators.mujoco_messages import engine_messages
from sim2real.simulators.mujoco_xml_child import HEAD
from sim2real.simulators.mujoco_xml_scan import (
    FILES,
    FOLDERS,
    STANDARD,
    Element,
    Place,
    XmlLimits,
    XmlRefusedError,
    refusal,
    scan_xml,
)

__all__ = ["XmlLimits", "XmlRefusedError", "XmlSource", "load_spec", "load_xml", "read_xml", "try_in_child"]

_LOCK = threading.Lock()
_PATIENCE = 10.0
"""s that a start of the child process and the transfer may take beyond the limit of compiling"""


@dataclass(frozen=True)
class XmlSource:
    """Checked XML with the bytes of every file it names, by the name MuJoCo looks them up."""

    name: str
    """file name for messages"""
    xml: str
    includes: dict[str, bytes] = field(default_factory=dict)
    assets: dict[str, bytes] = field(default_factory=dict)


@engine_messages()
def load_xml(source: Path | str, *, folder: Path | str | None = None, limits: XmlLimits = STANDARD) -> mujoco.MjModel:
    """The compiled model of untrusted XML.

    `source`: a path, or the XML itself (text that starts with "<"). Files that it names are read from `folder` and
    below (default: the folder of the path; for text: none). Raises `XmlRefusedError` for anything else than a
    model within the limits, `OSError` for a path that cannot be read.
    """
    model: mujoco.MjModel = load_spec(source, folder=folder, limits=limits).compile()
    return model


def load_spec(source: Path | str, *, folder: Path | str | None = None, limits: XmlLimits = STANDARD) -> mujoco.MjSpec:
    """As `load_xml`, before compiling: a `mujoco.MjSpec` to edit."""
    read = read_xml(source, folder=folder, limits=limits)
    try_in_child(read, limits)
    return mujoco.MjSpec.from_string(read.xml, include=read.includes, assets=read.assets)


def read_xml(source: Path | str, *, folder: Path | str | None = None, limits: XmlLimits = STANDARD) -> XmlSource:
    """Steps 1 of the module: the XML and its files, scanned. Raises `XmlRefusedError`, `OSError`."""
    if isinstance(source, str) and source.lstrip()[:1] in ("<", ""):
        name, text, home = "the given XML", source.encode(), None
    else:
        path = Path(source)
        name, text, home = path.name, _read_file(path, f"'{path}'", limits), path.resolve().parent
    root = None if home is None and folder is None else Path(os.path.realpath(folder or home or "."))
    home = home or root
    includes: dict[str, bytes] = {}
    elements: list[Element] = []
    waiting: list[tuple[str, bytes, tuple[str, ...]]] = [(name, text, (name,))]
    total = len(text)
    while waiting:
        file, content, chain = waiting.pop()
        for element in scan_xml(file, content, limits, included=len(chain) > 1):
            elements.append(element)
            if len(elements) > limits.elements:
                raise refusal(element.place, f"more than {limits.elements} elements", "raise XmlLimits.elements")
            if element.tag != "include":
                continue
            wanted = element.attributes.get("file", "")
            if wanted in chain:
                raise refusal(element.place, f"'{wanted}' includes itself", "remove one of the includes")
            if len(includes) >= limits.includes or wanted in includes:
                raise refusal(
                    element.place,
                    f"'{wanted}' is included twice" if wanted in includes else f"more than {limits.includes} includes",
                    "include each file once",
                )
            includes[wanted] = _inside(element.place, wanted, "", home, root, limits)
            total += len(includes[wanted])
            waiting.append((wanted, includes[wanted], (*chain, wanted)))
    assets = dict(_assets(elements, home, root, limits))
    total += sum(map(len, assets.values()))
    if total > limits.all_bytes:
        raise XmlRefusedError(
            f"'{name}' and its files take {total} bytes, more than {limits.all_bytes}; raise XmlLimits.all_bytes"
        )
    return XmlSource(name, text.decode(), includes, assets)


def try_in_child(source: XmlSource, limits: XmlLimits = STANDARD) -> dict[str, int]:
    """Step 2 of the module: compile in the child process; its sizes nq, nv, nu. Raises `XmlRefusedError`."""
    answer = _ask(source, limits)
    name = f"'{source.name}'" if source.name != "the given XML" else source.name
    if "error" in answer and "allocate memory" not in answer["error"]:
        text = " ".join(str(answer["error"]).split())
        raise XmlRefusedError(f"{name} does not compile: {text}")
    if "odd" in answer:
        raise XmlRefusedError(f"{name} gives a model whose {answer['odd']} is not finite; look for huge or NaN numbers")
    if "large" in answer or "error" in answer or answer.get("ended") == "memory":
        why = answer.get("large", "compiling it ran out of memory")
        raise XmlRefusedError(f"{name}: {why}, more than {limits.memory} bytes; raise XmlLimits.memory if you trust it")
    if answer.get("ended") == "time":
        raise XmlRefusedError(
            f"{name} was not compiled within {limits.seconds:g} s; raise XmlLimits.seconds if you trust it"
        )
    if "ended" in answer:
        how = answer.get("signal") or f"exit code {answer.get('code')}"
        raise XmlRefusedError(f"{name} ends the compiler ({how}), perhaps out of memory; it is not loaded")
    return {key: int(value) for key, value in answer.items()}


def _read_file(path: Path, shown: str, limits: XmlLimits) -> bytes:
    """The bytes of a regular file of bounded size; nothing else is opened for reading."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise XmlRefusedError(f"{shown} is not a regular file; give the path of a file")
        if found.st_size > limits.file_bytes:
            raise XmlRefusedError(
                f"{shown} has {found.st_size} bytes, more than {limits.file_bytes}; raise XmlLimits.file_bytes"
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limits.file_bytes)
    finally:
        os.close(descriptor)


def _inside(place: Place, wanted: str, below: str, home: Path | None, root: Path | None, limits: XmlLimits) -> bytes:
    """The bytes of a file named in the XML, if it lies in the folder after links are followed."""
    advice = "keep every file in the folder of the XML, or pass that folder as folder=..."
    if not wanted:
        raise refusal(place, "names no file", "give file='...'")
    if re.match(r"^[A-Za-z][A-Za-z0-9+.-]*:", wanted) or "\\" in wanted or "\0" in wanted:
        raise refusal(place, f"'{wanted}' is not a path in the folder", advice)
    if os.path.isabs(wanted) or os.path.isabs(below):
        raise refusal(place, f"'{wanted}' is an absolute path", advice)
    if home is None or root is None:
        raise refusal(place, f"'{wanted}': XML given as text has no files", "pass folder=...")
    path = Path(os.path.realpath(home / below / wanted))
    if root != path and root not in path.parents:
        raise refusal(place, f"'{os.path.join(below, wanted)}' lies outside '{root}'", advice)
    try:
        return _read_file(path, f"{place}: '{wanted}'", limits)
    except OSError as error:
        raise refusal(place, f"'{wanted}' cannot be read: {error.strerror}", advice) from error


def _assets(
    elements: list[Element], home: Path | None, root: Path | None, limits: XmlLimits
) -> Iterator[tuple[str, bytes]]:
    """Every file that an element other than `include` names, as (name MuJoCo looks up, bytes)."""
    folders = {
        key: value
        for item in elements
        if item.tag == "compiler"
        for key, value in item.attributes.items()
        if key in FOLDERS
    }
    strip = any(item.attributes.get("strippath") == "true" for item in elements if item.tag == "compiler")
    for element in elements:
        if element.tag in ("include", "compiler"):
            continue
        own = "texturedir" if element.tag == "texture" else "meshdir"
        below = folders.get(own, folders.get("assetdir", ""))
        for key in FILES:
            if key in element.attributes:
                wanted = element.attributes[key]
                wanted = os.path.basename(wanted) if strip else wanted
                content = _inside(element.place, wanted, below, home, root, limits)
                yield os.path.join(below, wanted), content


def _ask(source: XmlSource, limits: XmlLimits) -> dict[str, Any]:
    """One request to the compiler process, which is started when there is none and ended when it does not answer."""
    xml, files = source.xml.encode(), {**source.includes, **source.assets}
    head = json.dumps(
        {
            "xml": len(xml),
            "assets": [[name, len(content)] for name, content in files.items()],
            "seconds": limits.seconds,
            "memory": limits.memory,
        }
    ).encode()
    with _LOCK:
        process = _compiler(os.getpid())
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018  both are pipes
        try:
            process.stdin.write(HEAD.pack(len(head)) + head + xml + b"".join(files.values()))
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], limits.seconds + _PATIENCE)
            size = process.stdout.read(HEAD.size) if ready else b""
            body = process.stdout.read(HEAD.unpack(size)[0]) if len(size) == HEAD.size else b""
        except BrokenPipeError:
            body = b""
        if not body:
            process.kill()
            process.wait()
            _compiler.cache_clear()
            return {"ended": "time"}
    answer: dict[str, Any] = json.loads(body)
    return answer


@cache
def _compiler(parent: int) -> subprocess.Popen[bytes]:
    """The fork server of the process `parent`; it ends when that closes the pipe."""
    if not hasattr(os, "fork"):
        raise XmlRefusedError(
            "untrusted XML is compiled in a child process with limits, which needs Linux or macOS; "
            "pass a mujoco.MjSpec that you trust instead"
        )
    script = str(mujoco_xml_child.__file__)
    return subprocess.Popen(
        [sys.executable, "-I", script, json.dumps(sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
        env={"OMP_NUM_THREADS": "1", "HOME": "/", "PATH": "/usr/bin:/bin"},
        start_new_session=True,
    )
