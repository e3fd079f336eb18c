"""From `key=value` words to a checked configuration, composed by Hydra over the dataclasses of `sim2real.conf`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hydra import compose, initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sim2real.conf import COMMANDS, CUSTOM, GROUPS, register

BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")


EXTRAS = ("mujoco", "warp")
"""engines that an extra of the same name installs"""


SHORT = {"xml": "model.xml", "theta": "model.theta"}
"""words that mean a key of the model, where it has that key; theta.NAME= stays the start value of NAME"""
_SPECIAL = re.compile(r"([\\()\[\]{}:=, \t])")
"""characters to which Hydra gives a meaning in a key of a dictionary"""


class UsageError(ValueError):
    """The command line asks for something that does not exist or does not fit; the message says what does."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One configuration key as `--help` shows it."""

    name: str
    default: Any
    unit: str
    help: str
    choices: tuple[str, ...]
    path: bool
    group: str

    @property
    def open(self) -> bool:
        """Whether further keys below this one are the user's own (theta.NAME, fit.priors.NAME)."""
        return isinstance(self.default, dict)


def keys_of(config: type, prefix: str = "") -> list[Key]:
    """All keys of a configuration dataclass, nested ones with dots, in order."""
    found: list[Key] = []
    for item in dataclasses.fields(config):
        name, factory, note = prefix + item.name, item.default_factory, item.metadata
        if isinstance(factory, type) and dataclasses.is_dataclass(factory):
            found += keys_of(factory, name + ".")
        elif note:
            default = item.default if factory is dataclasses.MISSING else factory()
            found.append(Key(name, default, **{key: note[key] for key in ("unit", "help", "choices", "path", "group")}))
    return found


def compose_config(command: str, words: Sequence[str]) -> Any:
    """The configuration dataclass of `command` with the overrides `words` applied.

    Raises `UsageError` naming the word, what is wrong with it and the nearest thing that exists.
    """
    register()
    keys = {key.name: key for key in keys_of(COMMANDS[command])}
    chosen = {name: _choice(name, words) for name, key in keys.items() if key.group}
    for group, choice in chosen.items():
        keys |= (
            {key.name: key for key in keys_of(GROUPS[group][choice], group + ".")} if choice in GROUPS[group] else {}
        )
    words = [_spelled_out(word, keys) for word in words]
    columns = [word.removeprefix("schema.") for word in words if word.startswith("schema.")]
    plain = [word for word in words if not word.startswith("schema.") and word.partition("=")[0] not in chosen]
    overrides = [f"+{group}={choice}" for group, choice in chosen.items() if choice]
    overrides += [_checked(command, keys, word, custom=chosen.get("model") == CUSTOM) for word in plain]
    GlobalHydra.instance().clear()
    try:
        with initialize(version_base=None, config_path=None):
            composed = compose(command, overrides=overrides)
        if missing := sorted(OmegaConf.missing_keys(composed)):
            raise UsageError(f"{missing[0]} is missing: give {missing[0]}=...; see sim2real {command} --help")
        result: Any = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_reason(error)) from error
    result.columns = [*result.columns, *columns]
    _check_choices(result, keys)
    if result.threads < 1:
        raise UsageError(f"threads={result.threads}: expected at least 1")
    return result


def nearest(word: Any, known: Iterable[str]) -> str:
    """ "; did you mean ...?" for the closest known words, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=2, cutoff=0.55)
    return f"; did you mean {' or '.join(repr(item) for item in close)}?" if close else ""


def resolve_function(target: str, key: str) -> Callable[..., Any]:
    """The function at a dotted path such as `my_pkg.my_model`; the working directory is searched too.

    Raises `UsageError` naming the key and what could not be found.
    """
    module, _, name = target.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ImportError) and missing in EXTRAS:
            raise UsageError(f"{key}={target} needs {missing}: pip install 'sim2real[{missing}]'") from error
        raise UsageError(
            f"{key}={target}: no such function ({error}); give module.function, importable from here"
        ) from error
    if not callable(found):
        raise UsageError(f"{key}={target}: is a {type(found).__name__}, expected a function")
    return found


def _choice(group: str, words: Sequence[str]) -> str:
    """Which node of a group the words choose; a model given by `_target_` alone is the user's own."""
    named = [word.partition("=")[2] for word in words if word.startswith(f"{group}=")]
    known = GROUPS[group]
    if not named:
        inside = any(word.startswith(f"{group}.") for word in words)
        return "linear" if group == "policy" else CUSTOM if inside else ""
    if named[-1] not in known:
        own = "; a model of your own: model._target_=package.function" if group == "model" else ""
        raise UsageError(f"{group}={named[-1]}: there are {', '.join(known)}{nearest(named[-1], known)}{own}")
    return named[-1]


def _spelled_out(word: str, keys: dict[str, Key]) -> str:
    name, equals, value = word.partition("=")
    return f"{SHORT[name]}{equals}{value}" if SHORT.get(name) in keys else word


def _checked(command: str, keys: dict[str, Key], word: str, *, custom: bool) -> str:
    """The word as a Hydra override; raises `UsageError` for anything but a known key and a value."""
    name, equals, value = word.partition("=")
    parent = next((key for key in keys if keys[key].open and name.startswith(f"{key}.")), name.rpartition(".")[0])
    if not equals:
        raise UsageError(f"'{word}' is not of the form key=value{nearest(word, keys)}; see sim2real {command} --help")
    chosen = parent in keys and keys[parent].open
    free = chosen or (parent == "model" and (custom or name == "model._target_"))
    if name not in keys and not free:
        raise UsageError(f"unknown key '{name}'{nearest(name, keys)}; see sim2real {command} --help")
    if name in keys and keys[name].path and not value:
        raise UsageError(f"{name}= is empty: give a path")
    if name in keys and isinstance(keys[name].default, bool) and value.lower() not in BOOLEANS:
        raise UsageError(f"{name}={value}: expected true or false")
    if name in keys and isinstance(keys[name].default, list) and value[:1] != "[":
        value = f"[{value}]"
    # a path may hold what Hydra's grammar gives a meaning: quote it
    if name in keys and keys[name].path and not (value[:1] in "[\"'" or value == "null"):
        # backslashes count only before a quote
        escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), value)
        value = f"'{escaped}'"
    entry = name.removeprefix(f"{parent}.")
    if chosen and "." in entry:  # torso.mass is one name, not two levels
        quoted = _SPECIAL.sub(r"\\\1", entry)
        return f"++{parent}={{{quoted}: {value}}}"
    return f"{'' if name in keys else '++'}{name}={value}"


def _check_choices(config: Any, keys: dict[str, Key]) -> None:
    for key in keys.values():
        value = _value_at(config, key.name)
        if key.choices and value not in key.choices:
            known = ", ".join(key.choices)
            raise UsageError(f"{key.name}={value}: expected one of {known}{nearest(value, key.choices)}")


def _reason(error: BaseException) -> str:
    if isinstance(error, OverrideParseException):
        return f"'{error.override}': {error.message.splitlines()[0]}"
    cause = error.__cause__ or error
    text = str(cause).strip().splitlines()
    place = next((line.split(":", 1)[1].strip() for line in text if line.strip().startswith("full_key:")), "")
    return f"{place}: {text[0]}" if place else text[0]


def _value_at(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part)
    return config
