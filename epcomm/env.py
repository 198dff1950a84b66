"""The only reader of the process environment: one table of what epcomm looks at.

`VARIABLES` is printed by ``epcomm doctor`` and compared with the README by a test.
Values are read at use, not at import, so a program may set them before its first Buffer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from epcomm.errors import InputError

__all__ = [
    "LAUNCHER_SIZE_VARIABLES",
    "VARIABLES",
    "Variable",
    "child_environment",
    "get",
    "launcher_local_rank",
    "launcher_size",
    "lookup",
    "provide",
]


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, type, default and meaning."""

    name: str
    type: type
    default: Any
    meaning: str


VARIABLES: dict[str, Variable] = {
    v.name: v
    for v in (
        Variable("EPCOMM_TIMEOUT_S", float, 100.0, "seconds a rank waits for its peers before PeerTimeout"),
        Variable("EPCOMM_CHECK", bool, False, "check every expert index for range and repetition"),
        Variable("EPCOMM_ABORT", bool, True, "an uncaught exception on one rank aborts the whole MPI job"),
        Variable("EPCOMM_BACKEND", str, "auto", "what backend='auto' means: auto, host or cuda"),
        Variable("EPCOMM_RANKS_PER_NODE", int, 0, "make virtual nodes of this many ranks (0: from the hosts)"),
        Variable(
            "EPCOMM_HOST_TRANSPORT", str, "auto", "host backend: auto, segments (shared memory) or messages (MPI)"
        ),
        Variable(
            "EPCOMM_TRANSPORT", str, "auto", "CUDA backend, between nodes: auto, ipc (stores within a host) or nvshmem"
        ),
        Variable("EPCOMM_SHM_DIR", str, "/dev/shm", "folder of the shared segments of the host backend"),
        Variable("EPCOMM_MPIRUN", str, "", "the mpirun that `epcomm run`, the demo and the tests start"),
        Variable("EPCOMM_CACHE_DIR", str, "", "folder of compiled kernels (default: the user's cache folder)"),
        Variable("EPCOMM_CUDA_SRC", str, "", "folder of the CUDA sources, instead of the packaged ones"),
    )
}

# What each launcher tells its children about the size of the job: MPICH and Intel MPI, Open MPI, Slurm's PMIx.
LAUNCHER_SIZE_VARIABLES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "PMIX_SIZE")
# And about the number of a child on its host.
_LOCAL_RANK_VARIABLES = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")

_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off", ""}


def get(name: str) -> Any:
    """Value of a variable of `VARIABLES`, converted to its type.

    Raises:
        InputError: the text cannot be read as that type.
    """
    variable = VARIABLES[name]
    text = os.environ.get(name)
    if text is None:
        return variable.default
    if variable.type is bool:
        if text.lower() not in _TRUE | _FALSE:
            raise InputError(name, got=repr(text), wanted="0 or 1", do="correct the environment variable")
        return text.lower() in _TRUE
    try:
        return variable.type(text)
    except ValueError:
        raise InputError(
            name,
            got=repr(text),
            wanted=f"a value of type {variable.type.__name__}",
            do="correct the environment variable",
        ) from None


def launcher_size() -> int:
    """Number of ranks the launcher says it started, 1 if there was none."""
    sizes = [os.environ.get(name, "") for name in LAUNCHER_SIZE_VARIABLES]
    return max([int(size) for size in sizes if size.isdigit()], default=1)


def launcher_local_rank() -> int | None:
    """Number of this process among those that the launcher started on its host; None if it does not say."""
    numbers = [os.environ.get(name, "") for name in _LOCAL_RANK_VARIABLES]
    return next((int(number) for number in numbers if number.isdigit()), None)


def lookup(name: str) -> str | None:
    """A variable that belongs to somebody else (PATH, HOME, CUDA_…), as text."""
    return os.environ.get(name)


def provide(defaults: Mapping[str, str]) -> None:
    """Set variables for a library of somebody else that reads its options there, where the user has not set them.

    They stay set, since it may read them late; so child processes inherit them.
    """
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def child_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """A copy of the environment for a child process, with `changes` applied."""
    return {**os.environ, **(changes or {})}
