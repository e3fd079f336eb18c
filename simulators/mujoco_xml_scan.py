"""One file of MuJoCo XML, read element by element with its line, without compiling it.

Refused here: anything that is no plain XML in UTF-8, entities, plugins, other models as assets, numbers that are not
finite, absurd counts. What else is wrong the compiler says, in a process of its own (`mujoco_xml`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from xml.parsers import expat

FILES = ("file", "fileright", "fileup", "fileleft", "filedown", "filefront", "fileback")
FOLDERS = ("assetdir", "meshdir", "texturedir")
_TEXT = frozenset(
    re.split(
        r"\s+",
        """name class childclass file model joint joint1 joint2 body body1 body2 geom geom1 geom2 site site1 site2
        tendon tendon1 tendon2 actuator mesh material texture hfield target objname refname reftype objtype prefix data
        jointinparent cranksite slidersite refsite sidesite flex skin key plugin instance value content_type""",
    )
)
"""attributes whose words may be any text; elsewhere `nan` and `inf` are numbers"""
_NO_NUMBER = re.compile(r"(?i)(?:^|[\s,])[+-]?(nan|inf|infinity)(?:\([^)]*\))?(?=$|[\s,])")
_REFUSED = {
    "plugin": "plugins run native code",
    "extension": "plugins run native code",
    "model": "another model as an asset",
    "attach": "another model as an asset",
}
_MOST: dict[tuple[str, str], float] = {
    ("replicate", "count"): 1e4,
    ("composite", "count"): 1e4,
    ("flexcomp", "count"): 1e5,
    ("hfield", "nrow"): 4096,
    ("hfield", "ncol"): 4096,
    ("texture", "width"): 16384,
    ("texture", "height"): 16384 * 6,
    ("size", "njmax"): 1e6,
    ("size", "nconmax"): 1e6,
    ("size", "nstack"): 1e8,
    ("size", "nkey"): 1e4,
    ("size", "nuserdata"): 1e6,
    **{
        ("size", f"nuser_{kind}"): 1000
        for kind in ("body", "jnt", "geom", "site", "cam", "tendon", "actuator", "sensor")
    },
}
"""largest product of the numbers of an attribute"""
_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50, "E": 2**60}


class XmlRefusedError(ValueError):
    """XML that is not loaded; the message says file, line where there is one, what is wrong and what to do."""


@dataclass(frozen=True)
class XmlLimits:
    """What a model may take. Bytes, s and counts."""

    file_bytes: int = 32 * 2**20
    """XML and any one file"""
    all_bytes: int = 256 * 2**20
    """XML and all its files"""
    elements: int = 200_000
    depth: int = 100
    includes: int = 100
    seconds: float = 20.0
    """compiling and one step"""
    memory: int = 2 * 2**30
    """of the compiler, and of the arena of the model"""


STANDARD = XmlLimits()


@dataclass(frozen=True)
class Place:
    """Where in the XML something stands."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"'{self.file}', line {self.line}"


@dataclass(frozen=True)
class Element:
    """One element as it was read, before anything is made of it."""

    place: Place
    tag: str
    attributes: dict[str, str]
    depth: int
    parents: tuple[str, ...]


def refusal(place: Place, what: str, advice: str) -> XmlRefusedError:
    """The error that says where, what is wrong and what to do."""
    return XmlRefusedError(f"{place}: {what}; {advice}")


def scan_xml(file: str, content: bytes, limits: XmlLimits, *, included: bool) -> Iterator[Element]:
    """The elements of one file, each checked by itself."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise refusal(
            Place(file, line), f"is not well-formed XML in UTF-8 ({error.reason})", "save it as UTF-8"
        ) from error
    found: list[Element] = []
    open_tags: list[str] = []
    repeats: list[float] = []
    parser = expat.ParserCreate("UTF-8")

    def place() -> Place:
        return Place(file, parser.CurrentLineNumber)

    def refuse_doctype(*_: Any) -> None:
        raise refusal(place(), "a DOCTYPE or entity", "write the text out; MuJoCo XML needs none")

    def start(tag: str, attributes: dict[str, str]) -> None:
        if len(open_tags) >= limits.depth:
            raise refusal(place(), f"elements nested deeper than {limits.depth}", "raise XmlLimits.depth")
        if not open_tags and not included and tag != "mujoco":
            raise refusal(place(), f"the root is <{tag}>", "only MuJoCo's own format (<mujoco>) is read")
        if len(found) >= limits.elements:
            raise refusal(place(), f"more than {limits.elements} elements", "raise XmlLimits.elements")
        element = Element(place(), tag, attributes, len(open_tags), tuple(open_tags))
        repeats.append((repeats[-1] if repeats else 1.0) * _check_element(element, limits))
        if repeats[-1] > _MOST["replicate", "count"]:
            raise refusal(place(), f"replicates make {repeats[-1]:.3g} copies", "at most 10000 are made")
        open_tags.append(tag)
        found.append(element)

    def end(tag: str) -> None:
        open_tags.pop()
        repeats.pop()

    parser.StartDoctypeDeclHandler = refuse_doctype
    parser.EntityDeclHandler = refuse_doctype
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        what = expat.ErrorString(error.code)
        raise refusal(Place(file, error.lineno), f"is not well-formed XML in UTF-8 ({what})", "mend it") from error
    return iter(found)


def _check_element(element: Element, limits: XmlLimits) -> float:
    """How many copies of its children the element asks for; raises for what has no place in a model."""
    place, tag = element.place, element.tag
    # <default><... class> of a mesh or body named model is fine; the asset <model> and <attach> are not
    if tag in _REFUSED and not (tag == "model" and "asset" not in element.parents):
        raise refusal(place, f"<{tag}>: {_REFUSED[tag]}", "remove it, or compile a model you trust with mujoco.MjSpec")
    for key, value in element.attributes.items():
        if key in FOLDERS and (os.path.isabs(value) or re.match(r"^[A-Za-z][A-Za-z0-9+.-]*:", value)):
            raise refusal(place, f"{key}='{value}' is not a folder below", "give a path below the folder of the XML")
        if key == "plugin":
            raise refusal(place, f"<{tag} plugin>: {_REFUSED['plugin']}", "remove it")
        if key not in _TEXT and key not in FILES and (odd := _NO_NUMBER.search(value)):
            raise refusal(place, f"<{tag} {key}> holds {odd[1]}", "give a finite number")
        if (tag, key) in _MOST:
            _check_count(place, tag, key, value)
        if (tag, key) == ("size", "memory"):
            _check_memory(place, value, limits)
    numbers = _numbers(element.attributes.get("count", "1")) if tag == "replicate" else [1.0]
    return max(numbers[0], 1.0) if numbers else 1.0


def _numbers(value: str) -> list[float]:
    try:
        return [float(word) for word in value.split()]
    except ValueError:
        return []  # MuJoCo says what is wrong with it


def _check_count(place: Place, tag: str, key: str, value: str) -> None:
    product = 1.0
    for number in _numbers(value):
        product *= abs(number)
    if not product <= _MOST[tag, key]:
        raise refusal(place, f"<{tag} {key}> asks for {product:.3g}", f"at most {_MOST[tag, key]:.3g} are allowed")


def _check_memory(place: Place, value: str, limits: XmlLimits) -> None:
    found = re.fullmatch(r"\s*(-?\d+)\s*([KMGTPE]?)\s*", value, re.IGNORECASE)
    asked = int(found[1]) * _BYTES[found[2].upper()] if found else 0
    if asked > limits.memory:
        raise refusal(place, f"<size memory> asks for {value}", f"at most {limits.memory} bytes; see XmlLimits.memory")
