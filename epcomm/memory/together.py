"""Steps that all ranks take or none."""

from __future__ import annotations

from typing import Any

from epcomm.bootstrap import Communicator
from epcomm.errors import BootstrapError

__all__ = ["agree"]


def agree(comm: Communicator, failure: Exception | None, what: str, *, wanted: str) -> None:
    """Raise on all ranks if one has failed. Collective, blocks the host.

    Args:
        comm: the ranks.
        failure: what went wrong on this rank, None: nothing. It is raised here.
        what: the thing that all ranks need, for the other ranks' message.
        wanted: what each rank was to have.

    Raises:
        BootstrapError: another rank has failed; names it and repeats what it said.
    """
    answers: list[Any] = comm.allgather(None if failure is None else f"{failure} {_notes(failure)}".rstrip())
    if failure is not None:
        raise failure
    messages = {rank: answer for rank, answer in enumerate(answers) if answer is not None}
    if messages:
        raise BootstrapError(
            what,
            got="; ".join(f"on rank {rank}: {message}" for rank, message in messages.items()),
            wanted=wanted,
            do="look at those ranks first",
        )


def _notes(failure: Exception) -> str:
    return " ".join(f"({note})" for note in getattr(failure, "__notes__", ()))
