"""Mistakes of one process among several: who raises what, in which call, and that the Buffers work afterwards."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest
from helpers import moe
from helpers.calls import (
    TIMEOUT_S,
    assert_explains,
    assert_mismatch,
    assert_peer_error,
    call,
    check_disagreement,
    check_mistake,
    error_of,
    raises,
    set_scene,
)
from helpers.mistakes import DISAGREEMENTS, MISTAKES

from epcomm import Buffer, Config
from epcomm.errors import HandleError, InputError, PeerError, RankMismatch, RoutingError

# One mistake for each operation, where it is the way of the answer that differs.
ONE_EACH = [mistake for mistake in MISTAKES if mistake.name in ("x_of_wrong_dtype", "weights_of_wrong_dtype")]
WAYS = {
    "segments": ("segments", None),
    "messages": ("messages", None),
    "nodes": ("segments", 2),
    "messages_nodes": ("messages", 2),
}


@pytest.fixture
def buffer(comm):
    with Buffer(comm, low_latency_mode=True, timeout_s=TIMEOUT_S) as buffer:
        yield buffer


@pytest.mark.slow
@pytest.mark.ranks(2)
@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_mistake(comm, mistake, monkeypatch):
    """In the very first call of a Buffer, when nothing is mapped yet."""
    monkeypatch.setenv("EPCOMM_CHECK", "1")
    with Buffer(comm, low_latency_mode=True, timeout_s=TIMEOUT_S) as buffer:
        check_mistake(comm, buffer, mistake, bad=1)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("disagreement", DISAGREEMENTS, ids=str)
def test_disagreement(comm, buffer, disagreement):
    check_disagreement(comm, buffer, disagreement, odd=1)


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.parametrize(("transport", "ranks_per_node"), WAYS.values(), ids=WAYS)
def test_the_other_ways_of_the_rows(comm, transport, ranks_per_node, monkeypatch):
    """By message and over two hops; one Buffer lives through all of it."""
    monkeypatch.setenv("EPCOMM_HOST_TRANSPORT", transport)
    settings = {"low_latency_mode": True, "ranks_per_node": ranks_per_node, "timeout_s": TIMEOUT_S}
    with Buffer(comm, **settings) as buffer:
        for number, mistake in enumerate(ONE_EACH):
            check_mistake(comm, buffer, mistake, bad=number % comm.size)
        for operation in ("dispatch", "cached_dispatch", "combine", "low_latency_dispatch", "low_latency_combine"):
            check_disagreement(comm, buffer, next(d for d in DISAGREEMENTS if d.operation == operation), odd=1)


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_two_ranks_make_mistakes_at_once(comm, buffer):
    scene = set_scene(buffer, "dispatch")
    wrong = {0: {"x": scene.mine.x.astype(np.float64)}, 2: {"expert_alignment": 0}}.get(comm.rank)
    error = error_of(lambda: call(scene, "dispatch", wrong))
    messages = comm.allgather(str(error))
    assert messages[0].startswith("x: got dtype float64")
    assert messages[2].startswith("expert_alignment: got 0")
    if comm.rank in (1, 3):
        assert_peer_error(error, {0: messages[0], 2: messages[2]})
    moe.assert_works(buffer)


class Mute:
    """An array whose framework fails without a word."""

    def __dlpack_device__(self):
        raise MemoryError

    def __dlpack__(self, **_):
        raise MemoryError


@pytest.mark.ranks(2)
@pytest.mark.parametrize("x", [Mute(), np.zeros((4, 2), "M8[s]")], ids=["mute_framework", "strange_dtype"])
def test_whatever_is_raised_reaches_the_peers(comm, buffer, x):
    scene = set_scene(buffer, "dispatch")
    if comm.rank == 0:
        with pytest.raises((MemoryError, InputError)):
            call(scene, "dispatch", {"x": x})
    else:
        with raises(PeerError, r"rank 0: (MemoryError\(\)|x: got )"):
            call(scene, "dispatch")
    moe.assert_works(buffer)


@pytest.mark.ranks(2)
def test_a_long_message_is_cut(comm, buffer):
    scene = set_scene(buffer, "dispatch")
    error = error_of(
        lambda: call(scene, "dispatch", {"expert_alignment": "\N{EURO SIGN}" * 2000} if comm.rank else None)
    )
    if comm.rank == 0:
        assert type(error) is PeerError
        assert 300 < str(error).count("\N{EURO SIGN}") < 400
        assert str(error).endswith("correct it there; this Buffer stays usable")
    moe.assert_works(buffer)


# -- different calls ----------------------------------------------------------------------------------------------

PAIRS = {
    "dispatch_and_combine": ("dispatch", "combine"),
    "dispatch_and_cached_dispatch": ("dispatch", "cached_dispatch"),
    "combine_and_cached_dispatch": ("combine", "cached_dispatch"),
}
LABELS = {"dispatch": "dispatch", "cached_dispatch": "dispatch(handle=...)", "combine": "combine"}


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.parametrize(("usual", "odd"), PAIRS.values(), ids=PAIRS)
def test_different_calls(comm, buffer, usual, odd):
    scene = set_scene(buffer, "combine")
    error = error_of(lambda: call(scene, odd if comm.rank == 1 else usual))
    assert_mismatch(comm, error, ("call",), odd=1)
    assert str(error).startswith("ranks made different calls: ")
    assert error.table["call"] == [LABELS[usual], LABELS[odd], LABELS[usual], LABELS[usual]]
    moe.assert_works(buffer)


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_different_calls_of_which_one_is_a_mistake(comm, buffer):
    """The calls come first: what the mistake is about, the others did not even ask."""
    scene = set_scene(buffer, "combine")
    wrong = {"x": np.zeros((1, 8))}
    error = error_of(lambda: call(scene, "dispatch", wrong) if comm.rank == 1 else call(scene, "combine"))
    assert_mismatch(comm, error, ("call",), odd=1)
    if comm.rank == 1:
        assert type(error.__context__).__name__ == "DtypeError"
    moe.assert_works(buffer)


# -- handles ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.parametrize("operation", ["cached_dispatch", "combine"])
def test_handles_of_different_dispatches(comm, buffer, operation):
    earlier, later = set_scene(buffer, operation), set_scene(buffer, operation)
    error = error_of(lambda: call(earlier if comm.rank == 0 else later, operation))
    assert_mismatch(comm, error, ("handle of dispatch",), odd=0)
    moe.assert_works(buffer)
    call(earlier, operation)  # together, an old handle is as good as a new one
    call(later, operation)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("operation", ["cached_dispatch", "combine", "low_latency_combine"])
def test_handle_of_another_buffer_on_one_rank(comm, buffer, operation):
    with Buffer(comm, low_latency_mode=True, timeout_s=TIMEOUT_S) as other:
        stranger = set_scene(other, operation)
        foreign = (stranger.received or stranger.arrived).handle
        scene = set_scene(buffer, operation)
        error = error_of(lambda: call(scene, operation, {"handle": foreign} if comm.rank == 0 else None))
        messages = comm.allgather(str(error))
        if comm.rank == 0:
            assert_explains(error, HandleError, "^handle: got the handle of another Buffer; wanted one")
        else:
            assert_peer_error(error, {0: messages[0]})
        moe.assert_works(buffer)
        moe.assert_works(other)


@pytest.mark.ranks(2)
def test_ranks_may_differ_in_what_is_theirs(comm, buffer):
    """Tokens, SMs, EPCOMM_CHECK, hooks, events and where the output goes are nobody else's business."""
    config = buffer.get_dispatch_config(2)
    own = Config(7 + comm.rank, *config.values()[1:])
    scene = set_scene(buffer, "low_latency_combine")
    call(scene, "dispatch", {"config": own, "async_finish": comm.rank == 1})
    out = np.empty(scene.mine.x.shape, moe.BFLOAT16) if comm.rank else None
    call(scene, "low_latency_combine", {"out": out})
    call(scene, "low_latency_dispatch", {"return_recv_hook": comm.rank == 0}).hook()
    moe.assert_works(buffer)


@pytest.mark.ranks(2)
def test_all_ranks_or_none_have_a_hook_for_a_combine(comm, buffer):
    scene = set_scene(buffer, "low_latency_combine")
    with raises(RankMismatch, r"return_recv_hook = 1 \(rank 0\), 0 \(rank 1\)"):
        call(scene, "low_latency_combine", {"return_recv_hook": comm.rank == 0}).hook()
    moe.assert_works(buffer)


# -- low latency --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_peers_that_wait_for_their_hook_hear_of_it_there(comm, buffer):
    scene = set_scene(buffer, "low_latency_dispatch")
    if comm.rank == 1:
        with raises(InputError, "^async_finish: got also return_recv_hook"):
            call(scene, "low_latency_dispatch", {"async_finish": True, "return_recv_hook": True})
    else:
        hook = call(scene, "low_latency_dispatch", {"return_recv_hook": True}).hook
        with raises(PeerError, "rank 1: async_finish: got also return_recv_hook"):
            hook()
        hook()  # a second call does nothing, as always
    moe.assert_works(buffer)


@pytest.mark.slow
@pytest.mark.ranks(4)
def test_other_indices_in_a_low_latency_combine(comm, buffer):
    """The rank finds out from what arrives; its peers have what they need."""
    scene = set_scene(buffer, "low_latency_combine")
    if comm.rank == 1:
        other = np.roll(scene.mine.topk_idx, 1, axis=1).copy()
        other[0] = -1
        with raises(RoutingError, r"^low_latency_combine: topk_idx: got \d+ rows from rank \d for \d+ choices"):
            call(scene, "low_latency_combine", {"topk_idx": other})
    else:
        call(scene, "low_latency_combine")
    moe.assert_works(buffer)


# -- construction -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EPCOMM_TIMEOUT_S", "soon"),
        ("EPCOMM_CHECK", "perhaps"),
        ("EPCOMM_ABORT", "2"),
        ("EPCOMM_RANKS_PER_NODE", "two"),
    ],
)
def test_a_variable_that_one_rank_cannot_read(comm, name, value, monkeypatch):
    if comm.rank == 1:
        monkeypatch.setenv(name, value)
    error = error_of(lambda: Buffer(comm))
    messages = comm.allgather(str(error))
    if comm.rank == 1:
        assert_explains(error, InputError, f"^{name}: got '{value}'; wanted")
    else:
        assert_peer_error(error, {1: messages[1]})
    monkeypatch.undo()
    with Buffer(comm, timeout_s=TIMEOUT_S) as buffer:
        moe.assert_works(buffer)


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.parametrize("name", ["EPCOMM_HOST_TRANSPORT", "ranks_per_node", "low_latency_mode"])
def test_ranks_that_disagree_about_a_buffer(comm, name, monkeypatch):
    settings = {}
    if name == "EPCOMM_HOST_TRANSPORT":
        monkeypatch.setenv(name, "messages" if comm.rank == 2 else "segments")
    else:
        settings = {name: 4 if comm.rank == 2 else 1} if name == "ranks_per_node" else {name: comm.rank == 2}
    assert_mismatch(comm, error_of(lambda: Buffer(comm, **settings)), (name,), odd=2)


@pytest.mark.ranks(2)
def test_a_folder_without_segments(comm, monkeypatch):
    """No error: rows go by message where one rank has no room for shared memory."""
    if comm.rank == 1:
        monkeypatch.setenv("EPCOMM_SHM_DIR", "/nowhere/at/all")
    with Buffer(comm, low_latency_mode=True, timeout_s=TIMEOUT_S) as buffer:
        moe.assert_works(buffer)
        assert buffer.stats["bytes_sent_by_message"] > 0


@pytest.mark.ranks(2)
def test_a_forked_child_does_not_close_its_parents_buffer(comm, buffer):
    moe.assert_works(buffer)
    if comm.rank == 0:
        child = os.fork()
        if child == 0:
            try:
                buffer.destroy()
                buffer.__del__()
                gc.collect()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
    comm.barrier()
    moe.assert_works(buffer)
