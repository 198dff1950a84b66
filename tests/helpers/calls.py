"""Calls that are right, calls that are not, and the check that a wrong one on one rank ends well on all ranks.

The rank that makes a mistake raises its own error and the others a `PeerError` that repeats it; ranks that disagree
all raise the same `RankMismatch`. All of that in the call itself, and afterwards the Buffer gives the oracle's bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from helpers import moe
from helpers.frames import Frames, down, frames_of, up_all

from epcomm import Buffer, DispatchResult, LayoutResult, LowLatencyDispatchResult
from epcomm.bootstrap import Communicator
from epcomm.errors import EpcommError, PeerError, RankMismatch

Keywords = dict[str, Any]

# Bounds a test that would hang; nothing waits that long when all is well.
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Scene:
    """One rank just before the call in question, its earlier results included. All arrays are NumPy's."""

    buffer: Buffer
    mine: moe.Inputs
    layout: LayoutResult
    received: DispatchResult | None = None
    arrived: LowLatencyDispatchResult | None = None

    @property
    def num_experts(self) -> int:
        return moe.num_experts(self.buffer.group_size)

    @property
    def frames(self) -> Frames:
        return frames_of(self.buffer)


def set_scene(buffer: Buffer, operation: str) -> Scene:
    """Make the calls that come before `operation`. Collective."""
    mine = moe.inputs(buffer.rank, buffer.group_size)
    topk_idx = frames_of(buffer).up(mine.topk_idx)
    layout = buffer.get_dispatch_layout(topk_idx, moe.num_experts(buffer.group_size))
    scene = Scene(buffer, mine, LayoutResult(*down(layout[:4]), layout.event))
    if operation in ("cached_dispatch", "combine"):
        received = moe.send(buffer, mine)
        return dataclasses.replace(scene, received=DispatchResult(*down(received[:3]), *received[3:]))
    if operation == "low_latency_combine":
        arrived = buffer.low_latency_dispatch(**up_all(frames_of(buffer), _low_latency_dispatch(scene)))
        return dataclasses.replace(scene, arrived=LowLatencyDispatchResult(*down(arrived[:2]), *arrived[2:]))
    return scene


def _dispatch(scene: Scene) -> Keywords:
    mine = scene.mine
    arrays = {"x": mine.x, "topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights}
    return {**arrays, **moe.layout_arguments(scene.layout)}


def _cached_dispatch(scene: Scene) -> Keywords:
    assert scene.received is not None
    return {"x": scene.mine.x, "handle": scene.received.handle}


def _combine(scene: Scene) -> Keywords:
    assert scene.received is not None
    received = scene.received
    return {"x": received.recv_x, "handle": received.handle, "topk_weights": received.recv_topk_weights}


def _low_latency_dispatch(scene: Scene) -> Keywords:
    return {
        "x": scene.mine.x,
        "topk_idx": scene.mine.topk_idx,
        "num_max_dispatch_tokens_per_rank": moe.MAX_TOKENS,
        "num_experts": scene.num_experts,
        "use_fp8": False,
    }


def _low_latency_combine(scene: Scene) -> Keywords:
    assert scene.arrived is not None
    return {
        "x": scene.arrived.recv_x,
        "topk_idx": scene.mine.topk_idx,
        "topk_weights": scene.mine.topk_weights,
        "handle": scene.arrived.handle,
    }


# What is called, and the keywords of a call that is right.
CALLS: dict[str, tuple[str, Callable[[Scene], Keywords]]] = {
    "dispatch": ("dispatch", _dispatch),
    "cached_dispatch": ("dispatch", _cached_dispatch),
    "combine": ("combine", _combine),
    "low_latency_dispatch": ("low_latency_dispatch", _low_latency_dispatch),
    "low_latency_combine": ("low_latency_combine", _low_latency_combine),
}


def call(scene: Scene, operation: str, changes: Keywords | None = None) -> Any:
    """`operation` with its right keywords, but for `changes`."""
    method, keywords = CALLS[operation]
    return getattr(scene.buffer, method)(**up_all(scene.frames, {**keywords(scene), **(changes or {})}))


@dataclass(frozen=True)
class Mistake:
    """A wrong call on one rank.

    Attributes:
        name: of the test.
        operation: key of `CALLS`.
        change: the wrong keywords.
        error: what it raises there.
        message: pattern that the message matches; starts with what is wrong.
        checked_routing: it is found with EPCOMM_CHECK=1 only.
    """

    name: str
    operation: str
    change: Callable[[Scene], Keywords]
    error: type[EpcommError]
    message: str
    checked_routing: bool = False

    def __str__(self) -> str:
        return f"{self.operation}-{self.name}"


@dataclass(frozen=True)
class Disagreement:
    """A call that is right by itself and does not fit to those of the other ranks.

    Attributes:
        change: other keywords, for the rank that disagrees.
        differing: the keys of `RankMismatch.table`.
    """

    name: str
    operation: str
    change: Callable[[Scene], Keywords]
    differing: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operation}-{self.name}"


def error_of(function: Callable[[], Any]) -> EpcommError | None:
    """The epcomm error that `function` raises."""
    try:
        function()
    except EpcommError as error:
        return error
    return None


@contextlib.contextmanager
def raises(error: type[EpcommError], pattern: str) -> Iterator[pytest.ExceptionInfo[EpcommError]]:
    """The body raises exactly `error`, with a message that matches `pattern` and explains itself."""
    with pytest.raises(error) as caught:
        yield caught
    assert_explains(caught.value, error, pattern)


def assert_explains(caught: EpcommError | None, error: type[EpcommError], pattern: str) -> None:
    """It is exactly `error`; its message matches, says what was got, and what was wanted or what to do."""
    assert type(caught) is error, repr(caught)
    assert re.search(pattern, str(caught)), str(caught)
    assert re.fullmatch(r"(?s)[^:]+.*: got .+; .+", str(caught)), str(caught)


def check_mistake(comm: Communicator, buffer: Buffer, mistake: Mistake, bad: int) -> None:
    """Rank `bad` makes the mistake; all ranks raise in that call, and the Buffer works. Collective."""
    scene = set_scene(buffer, mistake.operation)
    changes = mistake.change(scene) if comm.rank == bad else None
    error = error_of(lambda: call(scene, mistake.operation, changes))
    messages = comm.allgather(str(error))
    if comm.rank == bad:
        assert_explains(error, mistake.error, mistake.message)
    else:
        assert_peer_error(error, {bad: messages[bad]})
    assert_still_works(buffer, mistake.operation)


def assert_peer_error(error: EpcommError | None, messages: dict[int, str]) -> None:
    """`error` names the ranks that made a mistake, and repeats what they said."""
    assert type(error) is PeerError, repr(error)
    assert error.ranks == sorted(messages)
    assert all(f"rank {rank}: {text}" in str(error) for rank, text in messages.items()), str(error)


def check_disagreement(comm: Communicator, buffer: Buffer, disagreement: Disagreement, odd: int) -> None:
    """Rank `odd` makes another call than the others; all ranks get the same table. Collective."""
    scene = set_scene(buffer, disagreement.operation)
    changes = disagreement.change(scene) if comm.rank == odd else None
    error = error_of(lambda: call(scene, disagreement.operation, changes))
    assert_mismatch(comm, error, disagreement.differing, odd)
    assert_still_works(buffer, disagreement.operation)


def check_late_mistake(comm: Communicator, buffer: Buffer, mistake: Mistake, bad: int, **keywords: Any) -> None:
    """`check_mistake` where ranks do not wait for each other: the others learn from `Buffer.check`, once. Collective.

    Args:
        keywords: of the call, on all ranks, under the mistake.
    """
    scene = set_scene(buffer, mistake.operation)
    changes = {**keywords, **(mistake.change(scene) if comm.rank == bad else {})}
    error = error_of(lambda: call(scene, mistake.operation, changes))
    scene.frames.synchronize()
    comm.barrier()  # ranks that are threads have waited for each other's work, too
    news = error_of(buffer.check)
    if comm.rank == bad:
        assert_explains(error, mistake.error, mistake.message)
        assert news is None, repr(news)
    else:
        assert error is None, repr(error)
        assert type(news) is PeerError, repr(news)
        assert news.ranks == [bad]
    buffer.check()
    assert_still_works(buffer, mistake.operation)


def assert_still_works(buffer: Buffer, operation: str) -> None:
    """The operations beside which `operation` went wrong give the oracle's bits, in both slots. Collective."""
    for seed in (1, 2):
        if operation.startswith("low_latency"):
            moe.assert_low_latency_works(buffer, seed)
        else:
            moe.assert_throughput_works(buffer, seed)


def assert_mismatch(comm: Communicator, error: EpcommError | None, differing: tuple[str, ...], odd: int) -> None:
    """All ranks have a `RankMismatch` in which rank `odd` differs from the others. Collective."""
    assert type(error) is RankMismatch, repr(error)
    assert set(error.table) == set(differing)
    for name, values in error.table.items():
        assert len(values) == comm.size
        assert [rank for rank, value in enumerate(values) if value != values[(odd + 1) % comm.size]] == [odd], name
        assert f"{name} = {values[0]} (rank 0), " in str(error)
    assert comm.allgather(str(error)) == [str(error)] * comm.size


def guarded_calls(buffer: Buffer) -> dict[str, Callable[[], Any]]:
    """Every method that a Buffer which is destroyed, broken, in use or forked refuses, with None for all arguments."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, attribute in inspect.getmembers_static(type(buffer), inspect.isfunction):
        if name.startswith("_") or name in ("destroy", "get_comm_stream"):
            continue
        parameters = list(inspect.signature(attribute).parameters.values())[1:]
        required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        arguments: Keywords = {p.name: None for p in required}
        if name.startswith("internode"):  # these hand all arguments on
            arguments = {"x": None, "handle": None}
        calls[name] = functools.partial(getattr(buffer, name), **arguments)
    return calls


def some_slow(cases: dict[str, Any], fast: set[str]) -> list[Any]:
    """Parameters of a test by name, all but the `fast` ones marked as slow."""
    return [
        pytest.param(value, id=name, marks=() if name in fast else pytest.mark.slow) for name, value in cases.items()
    ]
