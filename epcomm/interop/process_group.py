"""The `Communicator` over a torch.distributed process group, for ranks that were started by torchrun or spawn."""

from __future__ import annotations

import os
import pickle
import time
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from epcomm.bootstrap.communicator import check_colors, check_root, check_segments
from epcomm.errors import BootstrapError, EpcommError, InputError, PeerTimeout

__all__ = ["ProcessGroupCommunicator"]

# Bound of the exchanges that have none of their own: torch's default for a process group.
_LIMIT = timedelta(minutes=30)
_TAG = 1


@dataclass(eq=False)
class _Channel:
    """A gloo group that nobody but epcomm talks on.

    Made of the class and not by ``torch.distributed.new_group``, which numbers its ranks in ascending order, wants
    all ranks of the world to call, or else derives the name of the rendezvous from a count that ranks with different
    groups disagree about.
    """

    gloo: Any
    error: EpcommError | None = None  # an exchange that did not end; the connections are closed then
    splits: dict[tuple[tuple[int, int], ...], _Channel] = field(default_factory=dict)

    @classmethod
    def open(cls, name: str, rank: int, size: int) -> _Channel:
        """Meet the other ranks under `name` in the store of the job. Collective."""
        store = dist.PrefixStore(f"epcomm/{name}", dist.distributed_c10d._get_default_store())
        return cls(dist.ProcessGroupGloo(store, rank, size, _LIMIT))

    @property
    def is_broken(self) -> bool:
        return self.error is not None or any(child.is_broken for child in self.splits.values())

    def exchange(
        self,
        operation: str,
        outgoing: Sequence[torch.Tensor],
        incoming: Sequence[torch.Tensor],
        timeout_s: float | None = None,
    ) -> None:
        """Send ``outgoing[r]`` to every rank r, and write ``incoming[r]`` with what r sends. Collective.

        Messages, not gloo's collectives: it is known who did not answer, and no thread of gloo's is left with a last
        reference to a tensor, which would abort the process when the interpreter is just exiting.
        """
        if self.error is not None:
            raise BootstrapError(
                "communicator", got="an earlier exchange that failed", do="make a new Buffer on all ranks"
            ) from self.error
        own, started = self.gloo.rank(), time.monotonic()
        incoming[own].copy_(outgoing[own])
        others = [rank for rank in range(self.gloo.size()) if rank != own]
        peer, is_done = own, False
        try:
            pending = []
            for peer in others:
                if incoming[peer].numel():
                    pending.append((peer, self.gloo.recv([incoming[peer]], peer, _TAG)))
                if outgoing[peer].numel():
                    pending.append((peer, self.gloo.send([outgoing[peer]], peer, _TAG)))
            for peer, work in pending:  # noqa: B007  # the handler below names it
                # Zero would mean no limit.
                left_s = None if timeout_s is None else max(timeout_s - (time.monotonic() - started), 1e-3)
                work.wait(_LIMIT if left_s is None else timedelta(seconds=left_s))
            is_done = True
        except RuntimeError as error:  # all that gloo raises
            elapsed_s = time.monotonic() - started
            is_late = elapsed_s >= (_LIMIT.total_seconds() if timeout_s is None else timeout_s)
            self.error = PeerTimeout(
                operation,
                phase="messages",
                waiting_rank=own,
                awaited_ranks=[peer],
                elapsed_s=elapsed_s,
                reason="no answer" if is_late else "a closed connection, hence no answer,",
            )
            raise self.error from error
        finally:
            if not is_done:
                self.error = self.error or BootstrapError(operation, got="an interrupt while it waited")


# One channel for all communicators on one process group, as long as that lives: each costs threads and sockets.
_channels: weakref.WeakKeyDictionary[Any, _Channel] = weakref.WeakKeyDictionary()


def _channel_of(group: Any) -> _Channel:
    """The channel of a process group. Collective; where a rank's channel is broken, all ranks open a new one."""
    known = _channels.get(group)
    answers: list[Any] = [None] * group.size()
    dist.all_gather_object(answers, (known is None or known.is_broken, uuid.uuid4().hex), group=group)
    if known is None or any(is_unusable for is_unusable, _ in answers):
        known = _channels[group] = _Channel.open(answers[0][1], group.rank(), group.size())
    return known


class ProcessGroupCommunicator:
    """The ranks of a process group as an `epcomm.Communicator`. Construction is collective and blocks the host.

    Beyond one exchange of objects at construction, which every backend of torch.distributed can do, nothing is sent
    over the user's group: epcomm talks over gloo connections of its own, and an exchange that times out leaves the
    user's untouched.

    Args:
        group: a process group this rank belongs to, of any backend; None for all ranks.

    Raises:
        BootstrapError: torch.distributed is not initialised, or has no gloo.
        InputError: something else than a process group of this rank.
    """

    def __init__(self, group: Any = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise BootstrapError(
                "torch.distributed",
                got="no process group",
                wanted="an initialised torch.distributed",
                do="call torch.distributed.init_process_group first, or pass an mpi4py communicator",
            )
        if not dist.is_gloo_available():
            raise BootstrapError("torch.distributed", got="a build without gloo", do="pass an mpi4py communicator")
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise InputError(
                "group",
                got=f"an object of type {type(group).__name__}",
                wanted="a torch.distributed process group that this rank belongs to",
            )
        self._bind(_channel_of(group), group.rank(), group.size())

    def _bind(self, channel: _Channel, rank: int, size: int) -> None:
        self._channel, self.rank, self.size = channel, rank, size

    def __repr__(self) -> str:
        return f"ProcessGroupCommunicator(rank={self.rank}, size={self.size})"

    def allgather(self, obj: Any) -> list[Any]:
        data = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        sizes = torch.empty(self.size, dtype=torch.int64)
        self._channel.exchange("allgather", [torch.tensor([data.numel()])] * self.size, sizes.split(1))
        parts = [torch.empty(size, dtype=torch.uint8) for size in sizes.tolist()]
        self._channel.exchange("allgather", [data] * self.size, parts)
        return [pickle.loads(part.numpy()) for part in parts]

    def bcast(self, obj: Any, root: int = 0) -> Any:
        check_root(root, self.size)
        return self.allgather(obj if self.rank == root else None)[root]

    def barrier(self) -> None:
        tokens = torch.zeros(2, self.size, dtype=torch.uint8)
        self._channel.exchange("barrier", tokens[0].split(1), tokens[1].split(1))

    def split(self, color: int, key: int) -> ProcessGroupCommunicator:
        answers = self.allgather((int(color), int(key), uuid.uuid4().hex))
        # Every rank sees the whole table, so all of them agree on whether this split was made before.
        table = tuple(place[:2] for place in answers)
        check_colors([c for c, _ in table])
        members = [rank for _, rank in sorted((k, r) for r, (c, k) in enumerate(table) if c == color)]
        splits, rank = self._channel.splits, members.index(self.rank)
        if table not in splits:
            splits[table] = _Channel.open(answers[members[0]][2], rank, len(members))
        child = object.__new__(ProcessGroupCommunicator)
        child._bind(splits[table], rank, len(members))
        return child

    def alltoallv(
        self,
        send: NDArray[np.uint8],
        send_counts: Sequence[int],
        recv: NDArray[np.uint8],
        recv_counts: Sequence[int],
        timeout_s: float | None = None,
    ) -> None:
        """As `Communicator.alltoallv`; a rank whose connection is closed counts as one that does not answer.

        Counts that disagree between two ranks go unnoticed or end the process: gloo does not compare them.
        """
        check_segments("send", send, send_counts, self.size)
        check_segments("recv", recv, recv_counts, self.size)
        outgoing = _tensor(send).split([*send_counts, send.size - sum(send_counts)])
        incoming = _tensor(recv).split([*recv_counts, recv.size - sum(recv_counts)])
        self._channel.exchange("alltoallv", outgoing, incoming, timeout_s)

    def abort(self, code: int) -> None:
        """End this process with exit status `code`, at once.

        The peers see closed connections, and torchrun or ``torch.multiprocessing`` ends them.
        """
        os._exit(code)


def _tensor(array: NDArray[np.uint8]) -> torch.Tensor:
    """The memory of `array`; a copy of what is read-only, which torch has no tensors for."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
