"""The ``epcomm`` program: a table of sub-commands, each a module of this package that is imported when it is used.

A command's module has ``add_parser(subparsers) -> None``, which adds its argparse parser and sets ``func`` to
``main(args) -> int``. Output of the library goes through here alone: nothing else prints.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from epcomm.errors import EpcommError

__all__ = ["COMMANDS", "main"]

# name -> (module, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("epcomm.cli.run", "start a command on N MPI ranks, so that the job ends when a rank fails"),
    "demo": ("epcomm.cli.demo", "send tokens through a small job and check every bit"),
    "doctor": ("epcomm.cli.doctor", "tell what works on this machine, and how to install what does not"),
    "bench": ("epcomm.cli.bench", "measure dispatch and combine"),
    "plan": ("epcomm.cli.plan", "predict traffic and times on several nodes"),
}

# Exit status of an error that was understood and explained; argparse uses 2 for wrong arguments.
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit status of the process.

    Args:
        argv: the arguments without the program's name; None: those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _make_parser(arguments)
    options = parser.parse_args(arguments)
    if not hasattr(options, "func"):
        parser.print_help()
        return EXIT_USAGE
    try:
        return int(options.func(options))
    except EpcommError as error:
        print(f"epcomm: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, of which only the command that `arguments` ask for is complete: the others are not imported."""
    parser = argparse.ArgumentParser(
        prog="epcomm", description="Expert-parallel communication (MoE dispatch and combine)."
    )
    parser.add_argument("--version", action="version", version=f"epcomm {_version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        if name == chosen:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def _version() -> str:
    try:
        return metadata.version("epcomm")
    except metadata.PackageNotFoundError:  # a source tree on PYTHONPATH
        project = Path(__file__).parents[2] / "pyproject.toml"
        return str(tomllib.loads(project.read_text())["project"]["version"]) if project.exists() else "unknown"
