"""The child's side of a probe: call one function, send its findings home.

The answer is one line of standard output that begins with `ANSWER`, because the libraries a probe
loads print there too. Everything else on the two streams is only looked at when no answer came.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import epcomm
from epcomm.cli.doctor.findings import Finding

__all__ = ["ANSWER", "command", "main"]

ANSWER = "epcomm-doctor-answer "

# -P keeps the current folder out of sys.path: a random.py lying there must not break the doctor. The tree this
# process runs from goes in front instead, so that an uninstalled tree checks itself and not an installed release.
_BOOT = (
    "import sys; r = sys.argv.pop(1); r in sys.path or sys.path.insert(0, r); import {module} as m; sys.exit(m.main())"
)


def command(module: str, *arguments: str, runner: Sequence[str] = ()) -> list[str]:
    """Command line that runs ``module.main()`` of this very tree in a new interpreter.

    Args:
        module: full name of the module; its `main` takes no arguments and reads `sys.argv`.
        arguments: `sys.argv[1:]` of the child.
        runner: interpreter options that run a program, such as ``("-m", "mpi4py")``.
    """
    root = str(Path(next(iter(epcomm.__path__))).parent)
    return [sys.executable, "-P", *runner, "-c", _BOOT.format(module=module), root, *arguments]


def main() -> int:
    """Calls the function named ``package.module:function`` in `sys.argv[1]` and prints its findings.

    An exception goes to standard error as usual: the parent makes a line of the report from it.
    """
    module, _, function = sys.argv[1].partition(":")
    findings: list[Finding] = getattr(importlib.import_module(module), function)()
    answer = json.dumps([asdict(finding) for finding in findings])
    # A newline first: a C library may have left half a line.
    sys.stdout.write(f"\n{ANSWER}{answer}\n")
    sys.stdout.flush()
    return 0
