"""MATLAB level 5 MAT files: real numeric arrays and scalar structs of them, strictly checked.

Written here because `scipy.io.loadmat` ends the process on a torn file (an element type it does not know is an index
out of bounds in its C code); a log reader has to raise. Reference: MathWorks, MAT-File Format, version 5, tables 1-1
to 1-3: a file is a header of 128 bytes and elements (type, size, content), a matrix is an element made of elements.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_MATRIX, _COMPRESSED = 14, 15
_STRUCT_CLASS = 2
_COMPLEX = 0x0800
_MAX_DEPTH = 16

MatValue = np.ndarray | dict[str, "MatValue"] | None
"""a real array; the fields of a struct; None for anything else (text, cells, objects, complex or sparse arrays)"""


def read_mat5(data: bytes, *, max_bytes: int) -> dict[str, MatValue]:
    """All variables of a file. Raises `ValueError` where the content is cut off, torn or larger than `max_bytes`."""
    if len(data) < 128 or data[126:128] not in (b"IM", b"MI"):
        raise ValueError("no MAT level 5 header (level 4 files: save them again with '-v7')")
    order = "<" if data[126:128] == b"IM" else ">"
    variables: dict[str, MatValue] = {}
    for kind, content in _elements(memoryview(data)[128:], order):
        if kind == _COMPRESSED:
            ((kind, content),) = _elements(memoryview(_inflate(content, max_bytes)), order)
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} where a variable should be")
        name, value = _matrix(content, order, 0)
        if name in variables:
            raise ValueError(f"the variable '{name}' is there twice")
        variables[name] = value
    return variables


def _inflate(content: memoryview, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj()
    data = inflater.decompress(content, max_bytes)
    if not inflater.eof:
        problem = f"unpacks to more than allowed; at most {max_bytes} bytes are read"
        raise ValueError(problem if len(data) == max_bytes else "a packed variable is cut off")
    return data


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at < len(data):
        if len(data) - at < 8:
            raise ValueError("cut off inside the tag of an element")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind >> 16:  # the short form: size and type share one word, the content is the next
            kind, size, start, after = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            start = at + 8
            after = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > min(len(data), max(after, start)):
            raise ValueError(f"an element claims {size} bytes, {len(data) - start} are left")
        yield kind, data[start : start + size]
        at = after


def _numbers(kind: int, content: memoryview, order: str) -> np.ndarray:
    if kind not in _NUMBERS:
        raise ValueError(f"an element of type {kind} where numbers should be")
    return np.frombuffer(content, order + _NUMBERS[kind])


def _matrix(content: memoryview, order: str, depth: int) -> tuple[str, MatValue]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"structs nested deeper than {_MAX_DEPTH} levels")
    parts = list(_elements(content, order))
    if len(parts) < 3:
        return "", None  # an empty field
    flags, shape = _numbers(*parts[0], order), tuple(map(int, _numbers(*parts[1], order)))
    name = bytes(parts[2][1]).decode("utf-8")
    if len(flags) < 1 or len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"the array '{name}' has flags {flags.tolist()} and shape {shape}")
    class_, is_complex = int(flags[0]) & 0xFF, bool(int(flags[0]) & _COMPLEX)
    if class_ == _STRUCT_CLASS and math.prod(shape) == 1 and len(parts) >= 5:
        return name, _struct(parts[3:], order, depth)
    if class_ not in _CLASSES or is_complex:
        return name, None
    values = _numbers(*parts[3], order) if len(parts) > 3 else np.zeros(0)
    if len(values) != math.prod(shape):
        raise ValueError(f"the array '{name}' has shape {shape} but {len(values)} values")
    return name, values.astype(_CLASSES[class_]).reshape(shape, order="F")


def _struct(parts: list[tuple[int, memoryview]], order: str, depth: int) -> dict[str, MatValue]:
    """Field name length, field names side by side, then one matrix a field."""
    width = int(_numbers(*parts[0], order)[0])
    text = bytes(parts[1][1])
    if not 0 < width <= 64 or len(text) != width * (len(parts) - 2):
        raise ValueError(f"a struct has {len(parts) - 2} fields but {len(text)} bytes of names of {width}")
    names = [text[i : i + width].partition(b"\0")[0].decode("utf-8") for i in range(0, len(text), width)]
    return {name: _matrix(part, order, depth + 1)[1] for name, (_, part) in zip(names, parts[2:], strict=True)}
