"""The `sim2real` command: `sim2real fit|evaluate|tune key=value ...`.

Results go to standard output (tables, or one JSON object with --json); progress and errors to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

EXIT_CODES = """exit codes:
  0    done
  1    the log, the schema or a parameter file cannot be used; the message names file and row
  2    the command line is wrong: unknown key, model, parameter or value
  3    not converged (tune: the start was refused, or a constraint is violated); with strict=true also when flagged
  4    tune: waiting for new rollouts of the exported policy; run the same command again when they are there
  5    the output folder cannot be used: not writable, disk full, busy, or it holds a run with other settings
  130  interrupted; run the same command again to resume"""
_SUMMARY = {
    "fit": "System identification: the parameters of a simulator that reproduce a log, with honest intervals.",
    "evaluate": "Errors of a parameter set on a log, window by window from measured starts.",
    "tune": "Simulator parameters for the real return of the policy that training in the simulator finds.",
}
_EXAMPLE = {
    "fit": "sim2real fit log=runs/ schema=rig.yaml model=pendulum fit.delay=true leave_out=[run3] out=fitted",
    "evaluate": "sim2real evaluate params=fitted/params.json log=new_run.csv schema=rig.yaml --json",
    "tune": "sim2real tune params=fitted/params.json log=runs/ policy=linear data.mode=folder out=tuned",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see EXIT_CODES)."""
    parser = _parser()
    # key=value words may stand before and after the flags, which argparse's own positionals may not
    options, words = parser.parse_known_args(arguments)
    if strange := [word for word in words if word.startswith("-")]:
        parser.error(f"unknown option {strange[0]}")
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    if options.help:
        print(help_text(options.command))
        return 0
    if options.debug:
        return _run(options, words)
    try:
        return _run(options, words)
    except KeyboardInterrupt:
        return _fail(130, "interrupted; run the same command again to resume")
    except tuple(kind for kind, _ in _known_errors()) as error:
        code = next(code for kind, code in _known_errors() if isinstance(error, kind))
        return _fail(code, _explained(error))


def help_text(command: str) -> str:
    """Everything `sim2real COMMAND --help` prints: each key with its default, unit and meaning."""
    from sim2real.conf import COMMANDS, GROUPS
    from sim2real.conf.compose import keys_of

    keys = keys_of(COMMANDS[command])
    lines = [f"usage: sim2real {command} key=value ... [--json] [--debug]", "", _SUMMARY[command], ""]
    lines += [f"  {_EXAMPLE[command]}", "", "keys (default) [unit]:", *(_key_line(key) for key in keys)]
    for group in [key.group for key in keys if key.group]:
        for name, config in GROUPS[group].items():
            lines += ["", f"{group}={name}: {(config.__doc__ or '').strip()}"]
            lines += [_key_line(key) for key in keys_of(config, group + ".")]
    lines += [
        "",
        "  --json   one JSON object on standard output",
        "  --debug  full traceback for an error",
        "",
        EXIT_CODES,
    ]
    return "\n".join(lines)


def _key_line(key: Any) -> str:
    default = (
        "required" if key.default == "???" else json.dumps(key.default).replace('"', "").replace("Infinity", "inf")
    )
    name = f"{key.name}.NAME" if isinstance(key.default, dict) else key.name
    unit = f" [{key.unit}]" if key.unit else ""
    choices = f": {' | '.join(key.choices)}" if key.choices else ""
    return f"  {f'{name} ({default}){unit}':<44} {key.help}{choices}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sim2real",
        description="Tune simulator parameters for the real return of the policy that training would find.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="fit | evaluate | tune")
    for name, summary in _SUMMARY.items():
        command = commands.add_parser(name, help=summary, add_help=False)
        command.add_argument("-h", "--help", action="store_true")
        command.add_argument("--json", action="store_true")
        command.add_argument("--debug", action="store_true")
    return parser


def _run(options: argparse.Namespace, words: list[str]) -> int:
    import torch

    from sim2real.commands import evaluate_command, fit_command
    from sim2real.conf.compose import compose_config
    from sim2real.tables import evaluation_tables, fit_tables, tune_tables
    from sim2real.tune_command import tune_command

    jobs: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "fit": (fit_command, fit_tables),
        "evaluate": (evaluate_command, evaluation_tables),
        "tune": (tune_command, tune_tables),
    }
    command, tables = jobs[options.command]
    config = compose_config(options.command, words)
    torch.set_num_threads(config.threads)
    with _progress(options.command) as progress, _short_warnings():
        outcome = command(config, words, progress)
    if options.json:
        print(json.dumps(outcome.document, ensure_ascii=False))
    else:
        console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
        for table in tables(outcome.result):
            console.print(table)
    _say(outcome.message)
    return outcome.code


@contextmanager
def _progress(command: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error; nothing when that is not a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(command, total=None)
        yield lambda step, most, text: bar.update(task, completed=step, total=most, description=f"{command}  {text}")


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line each on standard error, without source code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *rest, **more: _say(f"warning: {message}")
        yield


def _known_errors() -> list[tuple[type[BaseException], int]]:
    """Errors that are answers, not bugs, with their exit codes; the first that fits counts."""
    from sim2real.checkpoint import CheckpointError, FolderBusyError
    from sim2real.conf.compose import UsageError
    from sim2real.solve_report import UnconvergedError

    return [
        (UsageError, 2),
        (CheckpointError, 5),
        (FolderBusyError, 5),
        (OSError, 5),
        (UnconvergedError, 3),
        (ValueError, 1),
    ]


def _explained(error: BaseException) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror or error}: '{error.filename}'" if error.filename else str(error.strerror or error)
    return str(error)


def _fail(code: int, text: str) -> int:
    _say(f"sim2real: {text}")
    return code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
