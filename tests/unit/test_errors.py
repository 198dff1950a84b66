"""What one rank gets wrong, and that every message explains itself.

What several processes do about the mistake of one is in tests/host/test_errors.py; construction and the states of a
Buffer are in test_buffer_states.py.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import moe
from helpers.calls import TIMEOUT_S, assert_still_works, call, raises, set_scene
from helpers.mistakes import MISTAKES, unaligned

import epcomm
from epcomm import Buffer, errors, reference, run_local
from epcomm.errors import (
    CapacityError,
    DtypeError,
    EpcommError,
    HandleError,
    InputError,
    LayoutError,
    RankMismatch,
    RingFull,
    RoutingError,
    ShapeError,
)
from epcomm.testing import assert_bitwise

PACKAGE = Path(epcomm.__file__).parent


@pytest.fixture
def buffer():
    with Buffer(low_latency_mode=True, timeout_s=TIMEOUT_S) as buffer:
        yield buffer


def on_ranks(size, program, **settings):
    """Run ``program(comm, buffer)`` on ranks that are threads; the Buffers end with it."""

    def rank_program(comm):
        with Buffer(comm, low_latency_mode=True, timeout_s=TIMEOUT_S, **settings) as buffer:
            return program(comm, buffer)

    return run_local(size, rank_program, timeout_s=3 * TIMEOUT_S)


# -- the exceptions -----------------------------------------------------------------------------------------------


def test_the_tree_in_the_docstring_is_the_tree():
    drawn = re.findall(r"^    ([│├└─ ]*)(\w+)(?: \((\w+)\))?", errors.__doc__, re.MULTILINE)
    path, names = [], []
    for branch, name, builtin in drawn:
        depth = len(branch) // 4
        path = [*path[:depth], getattr(errors, name)]
        names.append(name)
        bases = set(path[-1].__bases__)
        parent = path[-2] if depth else Exception
        assert parent in bases, name
        assert {base.__name__ for base in bases - {parent}} == ({builtin} if builtin else set()), name
    assert sorted(names) == sorted(errors.__all__)


# Their constructors make the message from facts.
OWN_WORDS = {"RankMismatch", "PeerError", "PeerTimeout"}


def raised_without_explanation(path: Path) -> list[str]:
    """Constructor calls that lack got=, or both wanted= and do= (which nobody knows when the job itself is broken)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in errors.__all__:
            keywords = {keyword.arg for keyword in node.keywords}
            has_rest = bool(keywords & {"wanted", "do"}) or node.func.id == "BootstrapError"
            if node.func.id not in OWN_WORDS and not ("got" in keywords and has_rest):
                found.append(f"{path.name}:{node.lineno}: {node.func.id}")
    return found


def test_every_error_says_what_was_got_and_what_to_do(tmp_path):
    bare = tmp_path / "bare.py"
    calls = [
        "InputError('x', got=1)",
        "ShapeError('x', wanted=1)",
        "DtypeError('x', got=1, do='2')",
        "PeerError('x', {})",
    ]
    bare.write_text("\n".join(calls))
    assert raised_without_explanation(bare) == ["bare.py:1: InputError", "bare.py:2: ShapeError"]
    assert [line for path in sorted(PACKAGE.rglob("*.py")) for line in raised_without_explanation(path)] == []


def test_message_of_the_constructor():
    assert str(EpcommError("x", got="dtype float64", wanted="float32", do="cast it")) == (
        "x: got dtype float64; wanted float32; cast it"
    )
    assert str(EpcommError("x", got=0)) == "x: got 0"
    assert str(EpcommError("x")) == "x"
    mismatch = RankMismatch("dispatch: ranks disagree", {"hidden": (64, 128)})
    assert mismatch.table == {"hidden": [64, 128]}
    assert "got hidden = 64 (rank 0), 128 (rank 1); wanted the same value on every rank" in str(mismatch)
    peer = errors.PeerError("combine", {2: "x: got 1", 0: "x: got 2"})
    assert peer.ranks == [0, 2]
    assert "got bad input on rank 0: x: got 2; rank 2: x: got 1;" in str(peer)
    late = errors.PeerTimeout("combine", phase="post", waiting_rank=1, awaited_ranks=[0, 3], elapsed_s=1.25)
    assert (late.operation, late.phase, late.waiting_rank, late.awaited_ranks) == ("combine", "post", 1, [0, 3])
    assert "combine, phase 'post': got no answer from rank 0, rank 3 after 1.2 s (waiting: rank 1)" in str(late)


# -- wrong arguments ----------------------------------------------------------------------------------------------


# Every number is divisible by one rank.
ALONE = [mistake for mistake in MISTAKES if mistake.name != "experts_not_divisible_by_ranks"]


@pytest.mark.parametrize("mistake", ALONE, ids=str)
def test_one_rank_alone(mistake, monkeypatch):
    monkeypatch.setenv("EPCOMM_CHECK", "1")
    with Buffer(low_latency_mode=True) as buffer:
        scene = set_scene(buffer, mistake.operation)
        with raises(mistake.error, mistake.message):
            call(scene, mistake.operation, mistake.change(scene))
        assert_still_works(buffer, mistake.operation)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_indices_out_of_range_select_nothing(dtype, monkeypatch):
    """Without EPCOMM_CHECK they do no more harm than -1 does; that goes for every other row as well."""
    monkeypatch.delenv("EPCOMM_CHECK", raising=False)
    wild = np.iinfo(dtype)

    def program(comm, buffer):
        rank, size = comm.rank, comm.size
        everyone = [moe.inputs(r, size) for r in range(size)]
        experts = moe.num_experts(size)
        meant = [one.topk_idx.astype(dtype) for one in everyone]
        for choices in meant:
            choices[0], choices[2] = (-1, 1, -1), (-1, -1, -1)
        given = meant[rank].copy()
        given[0], given[2] = (experts, 1, wild.max), (-2, wild.min, 10**6)
        x, weights = [one.x for one in everyone], [one.topk_weights for one in everyone]
        wanted = reference.dispatch(x, meant, experts, topk_weights=weights)
        layout = moe.layout_arguments(buffer.get_dispatch_layout(given, experts))
        got = buffer.dispatch(x[rank], topk_idx=given, topk_weights=weights[rank], **layout)
        assert_bitwise(got.recv_x, wanted[rank].recv_x)
        assert_bitwise(got.recv_topk_idx, wanted[rank].recv_topk_idx)
        assert_bitwise(got.recv_topk_weights, wanted[rank].recv_topk_weights)
        assert got.num_recv_tokens_per_expert_list == wanted[rank].num_recv_tokens_per_expert_list
        combined = buffer.combine(got.recv_x, got.handle).combined_x
        assert_bitwise(combined, reference.combine([w.recv_x for w in wanted], meant, experts)[rank][0])

        wanted = reference.low_latency_dispatch(x, meant, moe.MAX_TOKENS, experts, use_fp8=False)
        sums = reference.low_latency_combine([w.recv_x for w in wanted], meant, weights, wanted)
        got = buffer.low_latency_dispatch(x[rank], given, moe.MAX_TOKENS, experts, use_fp8=False)
        assert_bitwise(got.recv_count, wanted[rank].recv_count)
        assert_bitwise(got.handle.src_info, wanted[rank].src_info)
        combined = buffer.low_latency_combine(got.recv_x, given, weights[rank], got.handle).combined_x
        assert_bitwise(combined, sums[rank])

    on_ranks(2, program)


def test_an_expert_chosen_twice_gets_the_token_once():
    def program(comm, buffer):
        experts = moe.num_experts(2)
        topk_idx = np.array([[1, 1, 5], [5, -1, 5]])
        x = moe.inputs(comm.rank, 2).x[:2]
        layout = moe.layout_arguments(buffer.get_dispatch_layout(topk_idx, experts))
        got = buffer.dispatch(x, topk_idx=topk_idx, **layout)
        both = [moe.inputs(r, 2).x[:2] for r in range(2)]
        sent = [both[r][:1] for r in range(2)] if comm.rank == 0 else both
        assert_bitwise(got.recv_x, np.concatenate(sent))
        low = buffer.low_latency_dispatch(x, topk_idx, moe.MAX_TOKENS, experts, use_fp8=False)
        assert low.recv_count.tolist() == ([0, 2, 0, 0] if comm.rank == 0 else [0, 4, 0, 0])
        buffer.low_latency_combine(low.recv_x, topk_idx, np.ones((2, 3), np.float32), low.handle)
        moe.assert_works(buffer)

    on_ranks(2, program)


def test_layout_arguments(buffer):
    topk_idx = moe.inputs(0, 1).topk_idx
    for wrong in (0, -4, 4.0, None):
        with raises(ShapeError, "^num_experts: got .*; wanted a multiple of the 1 ranks"):
            buffer.get_dispatch_layout(topk_idx, wrong)
    with raises(DtypeError, "^topk_idx: got dtype float32; wanted int32 or int64"):
        buffer.get_dispatch_layout(topk_idx.astype(np.float32), 4)
    with raises(LayoutError, "^topk_idx: got strides"):
        buffer.get_dispatch_layout(topk_idx.T.copy().T, 4)
    with raises(ShapeError, "^topk_idx: got shape"):
        buffer.get_dispatch_layout(topk_idx[0], 4)
    moe.assert_works(buffer)


def test_small_arrays_may_be_unaligned(buffer):
    """Only rows move in units of 16 bytes."""
    scene = set_scene(buffer, "combine")
    call(scene, "combine", {"topk_weights": unaligned(scene.received.recv_topk_weights)})


# -- handles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["cached_dispatch", "combine", "low_latency_combine"])
def test_handle_of_another_buffer(operation, buffer):
    with Buffer(low_latency_mode=True) as other:
        stranger = set_scene(other, operation)
    scene = set_scene(buffer, operation)
    result = stranger.received or stranger.arrived
    with raises(HandleError, "^handle: got the handle of another Buffer; wanted one"):
        call(scene, operation, {"handle": result.handle})
    moe.assert_works(buffer)


@pytest.mark.parametrize(
    ("operation", "other"), [("combine", "low_latency_combine"), ("low_latency_combine", "combine")]
)
def test_handle_of_the_other_mode(operation, other, buffer):
    scene, stranger = set_scene(buffer, operation), set_scene(buffer, other)
    result = stranger.received or stranger.arrived
    with raises(HandleError, "^handle: got a (LowLatency|Dispatch)Handle; wanted the handle that"):
        call(scene, operation, {"handle": result.handle})
    moe.assert_works(buffer)


def test_combine_buffers_of_wrong_handles(buffer):
    high, low = set_scene(buffer, "combine").received.handle, set_scene(buffer, "low_latency_combine").arrived.handle
    with raises(HandleError, "^handle: got a LowLatencyHandle"):
        buffer.get_combine_buffer(low, np.float32)
    with raises(HandleError, "^handle: got a DispatchHandle"):
        buffer.get_next_low_latency_combine_buffer(high)
    with raises(DtypeError, "^dtype: got int32; wanted bfloat16 or float16 or float32"):
        buffer.get_combine_buffer(high, np.int32)
    with raises(DtypeError, "^dtype: got .*; wanted a dtype of NumPy"):
        buffer.get_combine_buffer(high, "float33")


# -- low latency --------------------------------------------------------------------------------------------------


def test_wrong_indices_in_a_low_latency_combine(buffer):
    scene = set_scene(buffer, "low_latency_combine")
    fewer = scene.mine.topk_idx.copy()
    fewer[fewer >= 0] = -1
    fewer[0, 0] = 0
    with raises(RoutingError, r"topk_idx: got \d+ rows from rank 0 for 1 choices; wanted the topk_idx of the"):
        call(scene, "low_latency_combine", {"topk_idx": fewer})
    moe.assert_works(buffer)


def test_zero_copy_takes_a_buffer_of_this_handle_once(buffer):
    scene = set_scene(buffer, "low_latency_combine")
    rows = buffer.get_next_low_latency_combine_buffer(scene.arrived.handle)
    rows[...] = scene.arrived.recv_x
    call(scene, "low_latency_combine", {"x": rows, "zero_copy": True})
    with raises(InputError, "^zero_copy: got no buffer of this handle's shape"):
        call(scene, "low_latency_combine", {"x": rows, "zero_copy": True})
    moe.assert_works(buffer)


def test_logfmt_takes_whole_groups_of_channels(buffer):
    scene = set_scene(buffer, "low_latency_dispatch")
    narrow = np.ones((len(scene.mine.x), 192), moe.BFLOAT16)
    arrived = call(scene, "low_latency_dispatch", {"x": narrow})
    arguments = (arrived.recv_x, scene.mine.topk_idx, scene.mine.topk_weights, arrived.handle)
    with raises(ShapeError, "^x: got hidden 192; wanted a multiple of 128; pad hidden, or pass use_logfmt=False"):
        buffer.low_latency_combine(*arguments, use_logfmt=True)
    buffer.low_latency_combine(*arguments)
    moe.assert_works(buffer)


def test_a_third_send_before_a_receive(buffer):
    scene = set_scene(buffer, "low_latency_dispatch")
    hooks = [call(scene, "low_latency_dispatch", {"return_recv_hook": True}).hook for _ in range(2)]
    with raises(RingFull, "^low_latency_dispatch: got 2 sends whose receive half has not run"):
        call(scene, "low_latency_dispatch", {"return_recv_hook": True})
    for hook in hooks:
        hook()
    moe.assert_works(buffer)


def test_low_latency_needs_its_mode():
    with Buffer() as buffer:
        scene = set_scene(buffer, "low_latency_dispatch")
        with raises(InputError, "^low-latency operation: got a Buffer with low_latency_mode=False"):
            call(scene, "low_latency_dispatch")
        moe.assert_works(buffer)


def test_masks(buffer):
    with raises(InputError, "^rank_to_mask: got 0; wanted another rank"):
        buffer.low_latency_update_mask_buffer(0, True)
    with raises(InputError, "^rank_to_mask: got 1; wanted another rank"):
        buffer.low_latency_update_mask_buffer(1, True)
    with raises(ShapeError, r"^mask_status: got shape \[2\]; wanted \[1\]"):
        buffer.low_latency_query_mask_buffer(np.zeros(2, np.int32))
    with raises(DtypeError, "^mask_status: got dtype int64; wanted int32"):
        buffer.low_latency_query_mask_buffer(np.zeros(1, np.int64))


def test_a_buffer_too_small_for_low_latency():
    with (
        Buffer(num_rdma_bytes=1 << 20) as small,
        raises(ShapeError, "^num_rdma_bytes: got 1048576; wanted at"),
    ):
        small.clean_low_latency_buffer(128, 7168, 8)


# -- other calls --------------------------------------------------------------------------------------------------


def test_local_buffer():
    with Buffer(num_nvl_bytes=1024) as buffer:
        assert buffer.get_local_buffer_tensor(np.float32).shape == (256,)
        for arguments in (
            (np.float32, 257),
            (np.float32, 1, 2),
            (np.float32, 1, 1024),
            (np.uint8, -1),
            (np.uint8, 1, -1),
        ):
            with raises(ShapeError, "^get_local_buffer_tensor: got bytes .* inside a region of 1024"):
                buffer.get_local_buffer_tensor(*arguments)
        with raises(ShapeError, "region of 0 bytes"):
            buffer.get_local_buffer_tensor(np.uint8, 1, use_rdma_buffer=True)


def test_record_stream_takes_an_array(buffer):
    buffer.record_stream(np.zeros(1), None)
    with raises(DtypeError, "^x: got a NoneType"):
        buffer.record_stream(None, None)


@pytest.mark.parametrize("wrong", [0, -1, 2.0, None])
def test_number_of_sms(wrong):
    with raises(ShapeError, "^new_num_sms: got .*; wanted an integer of at least 1"):
        Buffer.set_num_sms(wrong)


def test_dropped_rows_are_reported_once(buffer):
    scene = set_scene(buffer, "dispatch")
    topk_idx = np.zeros((3, 1), np.int64)
    layout = moe.layout_arguments(buffer.get_dispatch_layout(topk_idx, 4))
    buffer.dispatch(scene.mine.x, topk_idx=topk_idx, num_worst_tokens=1, **layout)
    with raises(CapacityError, "^dispatch: num_worst_tokens: got 3 rows for rank 0, of which 2 were dropped"):
        buffer.check()
    buffer.check()
