"""Mistakes of one rank on a GPU: who raises what, in which call or check, and that the Buffer works afterwards.

A dispatch exchanges counts, and all ranks raise in that call. A cached dispatch, one with `num_worst_tokens`, a combine
and all of low latency wait for nobody: the rank with the mistake raises, and the others learn of it from `check`.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from helpers import checks, moe
from helpers.calls import (
    TIMEOUT_S,
    assert_explains,
    assert_mismatch,
    assert_peer_error,
    assert_still_works,
    call,
    check_disagreement,
    check_late_mistake,
    check_mistake,
    error_of,
    raises,
    set_scene,
)
from helpers.cases import CASES
from helpers.frames import CUPY, down
from helpers.gpu import need_gpu
from helpers.mistakes import DISAGREEMENTS, MISTAKES

from epcomm import Buffer, Config
from epcomm.errors import (
    BootstrapError,
    CapacityError,
    DeviceError,
    DtypeError,
    HandleError,
    InputError,
    LayoutError,
    PeerError,
    RankMismatch,
    RoutingError,
    ShapeError,
)
from epcomm.testing import assert_bitwise

cupy = need_gpu()
pytestmark = pytest.mark.gpu

COUNTED = [m for m in MISTAKES if m.operation == "dispatch"]
WAITING_FOR_NOBODY = ("cached_dispatch", "combine", "low_latency_dispatch", "low_latency_combine")
# Arrays of GPUs are never read-only.
UNCOUNTED = [m for m in MISTAKES if m.operation in WAITING_FOR_NOBODY and not m.name.endswith("read_only")]
# These contradict the worst case itself, or are about the layout of calls that have no worst case.
WORST = [m for m in COUNTED if m.name not in ("negative_worst_case", "counts_against_the_mask")]
BY_NAME = {case.name: case for case in CASES}


def make_buffer(comm=None, num_nvl_bytes: int = 16 << 20, **settings) -> Buffer:
    return Buffer(comm, num_nvl_bytes, backend="cuda", timeout_s=TIMEOUT_S, **settings)


LOW_LATENCY = {"num_rdma_bytes": 4 << 20, "low_latency_mode": True}


@pytest.fixture(scope="module")
def buffer():
    """One Buffer outlives all mistakes of a job. It looks at every index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPCOMM_CHECK", "1")
        shared = make_buffer(**LOW_LATENCY)
    with shared:
        yield shared


@pytest.fixture(scope="module")
def careless_buffer():
    """One that does not look at indices, and so comes to ask the others."""
    with make_buffer(**LOW_LATENCY) as shared:
        yield shared


@pytest.mark.ranks(2)
@pytest.mark.parametrize("mistake", COUNTED, ids=str)
def test_mistake(comm, buffer, mistake):
    check_mistake(comm, buffer, mistake, bad=1)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("mistake", UNCOUNTED, ids=str)
def test_mistake_in_a_call_that_waits_for_nobody(comm, buffer, mistake):
    check_late_mistake(comm, buffer, mistake, bad=1)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("mistake", WORST, ids=str)
def test_mistake_with_num_worst_tokens(comm, buffer, mistake):
    check_late_mistake(comm, buffer, mistake, bad=1, num_worst_tokens=64)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "disagreement",
    [d for d in DISAGREEMENTS if d.operation == "dispatch" and d.name != "worst_case"],
    ids=str,
)
def test_disagreement(comm, careless_buffer, disagreement):
    check_disagreement(comm, careless_buffer, disagreement, odd=1)


@pytest.mark.ranks((2, 3))
@pytest.mark.parametrize("disagreement", [d for d in DISAGREEMENTS if d.operation in WAITING_FOR_NOBODY], ids=str)
def test_disagreement_in_a_call_that_waits_for_nobody(comm, careless_buffer, disagreement):
    """No row is moved on any rank, and all hear from `check` of the values that differ."""
    scene = set_scene(careless_buffer, disagreement.operation)
    call(scene, disagreement.operation, disagreement.change(scene) if comm.rank == 1 else None)
    CUPY.synchronize()
    assert_mismatch(comm, error_of(careless_buffer.check), disagreement.differing, odd=1)
    careless_buffer.check()
    assert_still_works(careless_buffer, disagreement.operation)


@pytest.mark.ranks(2)
def test_handles_of_different_dispatches(comm, careless_buffer):
    mine = moe.inputs(comm.rank, comm.size)
    handles = [moe.send(careless_buffer, mine).handle for _ in range(2)]
    careless_buffer.dispatch(CUPY.up(mine.x), handle=handles[comm.rank])
    CUPY.synchronize()
    error = error_of(careless_buffer.check)
    assert type(error) is RankMismatch, repr(error)
    assert list(error.table) == ["handle of dispatch"]
    moe.assert_works(careless_buffer)


@pytest.mark.ranks((2, 3))
def test_disagreement_about_the_worst_case(comm, buffer):
    """Whoever waits for counts hears of it in the call, the other one from `check`."""
    scene = set_scene(buffer, "dispatch")
    error = error_of(lambda: call(scene, "dispatch", {"num_worst_tokens": 64} if comm.rank == 1 else None))
    if comm.rank == 1:
        assert error is None, repr(error)
        CUPY.synchronize()
        error = error_of(buffer.check)
    assert type(error) is RankMismatch, repr(error)
    assert error.table == {"num_worst_tokens": ["64" if rank == 1 else "0" for rank in range(comm.size)]}
    buffer.check()
    assert_still_works(buffer, "dispatch")


@pytest.mark.ranks(2)
def test_disagreement_with_num_worst_tokens(comm, buffer):
    scene = set_scene(buffer, "dispatch")
    call(scene, "dispatch", {"num_worst_tokens": 64, "expert_alignment": 1 + comm.rank})
    CUPY.synchronize()
    assert_mismatch(comm, error_of(buffer.check), ("expert_alignment",), odd=1)
    buffer.check()
    assert_still_works(buffer, "dispatch")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("bad", [0, 1])
def test_counts_against_the_mask_with_num_worst_tokens(comm, buffer, bad):
    """Found on the GPU; nobody waits for that, so the rank itself hears of it later, too."""
    mistake = next(m for m in COUNTED if m.name == "counts_against_the_mask")
    scene = set_scene(buffer, "dispatch")
    call(scene, "dispatch", {"num_worst_tokens": 64, **(mistake.change(scene) if comm.rank == bad else {})})
    CUPY.synchronize()
    error = error_of(buffer.check)
    if comm.rank == bad:
        assert_explains(error, RoutingError, mistake.message)
    else:
        assert type(error) is PeerError, repr(error)
        assert error.ranks == [bad]
    buffer.check()
    assert_still_works(buffer, "dispatch")


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


@pytest.mark.ranks(4)
def test_two_ranks_make_mistakes_that_nobody_waits_for(comm, buffer):
    scene = set_scene(buffer, "combine")
    error = error_of(lambda: call(scene, "combine", {"bias": 3} if comm.rank in (0, 2) else None))
    assert (type(error) is DtypeError) == (comm.rank in (0, 2)), repr(error)
    CUPY.synchronize()
    news = error_of(buffer.check)
    assert type(news) is PeerError
    assert news.ranks == [rank for rank in (0, 2) if rank != comm.rank]
    moe.assert_works(buffer)


@pytest.mark.ranks(4)
def test_a_mistake_beside_a_disagreement(comm, buffer):
    """One rank makes a mistake while another waits for no counts: nobody hangs in telling the others."""
    scene = set_scene(buffer, "dispatch")
    wrong = {1: {"expert_alignment": 0}, 2: {"num_worst_tokens": 64}}.get(comm.rank)
    error = error_of(lambda: call(scene, "dispatch", wrong))
    if comm.rank == 1:
        assert_explains(error, ShapeError, "^expert_alignment: got 0")
    elif comm.rank == 2:
        assert error is None, repr(error)
        CUPY.synchronize()
        error = error_of(buffer.check)
    if comm.rank != 1:
        assert type(error) is PeerError, repr(error)
        assert error.ranks == [1]
    moe.assert_works(buffer)


@pytest.mark.ranks(2)
def test_mistakes_in_every_order(comm, buffer):
    """Rejected calls leave the sequences of all ranks equal, whatever follows."""
    one_each = [
        next(m for m in MISTAKES if m.operation == operation and m.name == "x_of_wrong_dtype")
        for operation in ("dispatch", "cached_dispatch", "combine")
    ]
    for bad, order in enumerate(itertools.permutations(one_each)):
        for mistake in order:
            if mistake.operation == "dispatch":
                check_mistake(comm, buffer, mistake, bad=bad % 2)
            else:
                check_late_mistake(comm, buffer, mistake, bad=bad % 2)


# -- what only a GPU knows ----------------------------------------------------------------------------------------


class InHostMemory(np.ndarray):
    """What `helpers.frames` does not bring up."""


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", ["x", "topk_idx", "topk_weights", "is_token_in_rank", "num_tokens_per_rank"])
def test_arrays_in_host_memory(comm, buffer, name):
    scene = set_scene(buffer, "dispatch")
    mine = {**vars(scene.mine), **scene.layout.arguments()}[name]
    error = error_of(lambda: call(scene, "dispatch", {name: mine.view(InHostMemory)} if comm.rank else None))
    messages = comm.allgather(str(error))
    if comm.rank:
        assert_explains(error, DeviceError, f"^{name}: got a CPU array; wanted an array on cuda")
    else:
        assert_peer_error(error, {1: messages[1]})
    moe.assert_works(buffer)


@pytest.mark.ranks(2)
def test_an_unaligned_bias(comm, buffer):
    """Kernels read 16 bytes at a time, where the host backend reads any address."""
    scene = set_scene(buffer, "combine")
    memory = cupy.zeros(scene.mine.x.size + 1, np.uint16)
    bias = cupy.ndarray(scene.mine.x.shape, moe.BFLOAT16, memory.data + 2)
    error = error_of(lambda: call(scene, "combine", {"bias": bias} if comm.rank else None))
    if comm.rank:
        assert_explains(error, LayoutError, "^bias: got memory 2 bytes past a multiple of 16")
    CUPY.synchronize()
    news = error_of(buffer.check)
    assert (type(news) is PeerError) == (comm.rank == 0), repr(news)
    moe.assert_works(buffer)


@pytest.mark.ranks((1, 8))
def test_more_sms_than_there_are(comm, num_ranks):
    """All ranks of a GPU must be on it at once; the error says how many SMs they may have."""
    num_sms = cupy.cuda.Device().attributes["MultiProcessorCount"]
    default = Buffer.get_dispatch_config(num_ranks)
    too_many = Config(num_sms // num_ranks + 1, *default.values()[1:])
    inputs = BY_NAME["uniform"].inputs(num_ranks)
    with make_buffer(comm) as buffer:
        with raises(CapacityError, rf"set_num_sms\({num_sms // num_ranks}\)"):
            checks.dispatch(buffer, inputs, config=too_many)
        fitting = Config(num_sms // num_ranks, *default.values()[1:])
        _, result = checks.dispatch(buffer, inputs, config=fitting)
        checks.assert_dispatched(buffer, inputs, result)
        with raises(CapacityError, "set_num_sms"):
            checks.combine(buffer, inputs, result, config=too_many)
        CUPY.synchronize()
        checks.assert_combined(buffer, inputs, checks.combine(buffer, inputs, result, config=fitting))
        news = error_of(buffer.check)
        assert (type(news) is PeerError) == (num_ranks > 1)


@pytest.mark.ranks(2)
def test_low_latency_calls_want_low_latency_mode(comm):
    mine = moe.inputs(comm.rank, comm.size)
    arguments = (CUPY.up(mine.x), CUPY.up(mine.topk_idx), moe.MAX_TOKENS, moe.num_experts(comm.size))
    with make_buffer(comm) as buffer:
        with raises(InputError, "^low-latency operation: got a Buffer with low_latency_mode=False"):
            buffer.low_latency_dispatch(*arguments)
        buffer.check()
        moe.assert_works(buffer)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("operation", ["low_latency_dispatch", "low_latency_combine"])
def test_mistakes_in_both_slots_and_in_halves(comm, buffer, operation):
    """A rejected call takes one slot on every rank, whether the others receive at once or later."""
    mistake = next(m for m in MISTAKES if m.operation == operation and m.name == "topk_idx_too_short")
    error_of(buffer.check)  # of earlier tests
    for number in range(5):
        scene = set_scene(buffer, operation)
        is_bad = comm.rank == number % 2
        changes = {"return_recv_hook": number > 2, **(mistake.change(scene) if is_bad else {})}
        if is_bad:
            assert error_of(functools.partial(call, scene, operation, changes)) is not None
        else:
            call(scene, operation, changes).hook()
        CUPY.synchronize()
        comm.barrier()
        assert type(error_of(buffer.check)) is (type(None) if is_bad else PeerError)
        assert_still_works(buffer, operation)


@pytest.mark.ranks(2)
def test_several_nodes_need_rings(comm):
    with raises(CapacityError, "^num_rdma_bytes: got 0; wanted at least "):
        make_buffer(comm, ranks_per_node=1)


@pytest.mark.ranks(2)
def test_a_device_that_is_not_there(comm):
    error = error_of(lambda: make_buffer(comm, device=99 if comm.rank == 1 else None))
    messages = comm.allgather(str(error))
    if comm.rank == 1:
        assert_explains(error, DeviceError, "^device: got cuda:99; wanted one of the")
    else:
        assert_peer_error(error, {1: messages[1]})
    with make_buffer(comm) as buffer:
        moe.assert_works(buffer)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("num_nvl_bytes", [1 << 48, None], ids=["too_large", "differing"])
def test_arenas_that_cannot_be(comm, num_nvl_bytes):
    if num_nvl_bytes is None:
        error = error_of(lambda: make_buffer(comm, 1 << (20 + comm.rank)))
        assert_mismatch(comm, error, ("num_nvl_bytes",), odd=1)
    else:
        error = error_of(lambda: make_buffer(comm, num_nvl_bytes))
        assert type(error) is CapacityError, repr(error)
    with make_buffer(comm) as buffer:
        moe.assert_works(buffer)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("operation", ["cached_dispatch", "combine"])
def test_the_handle_of_another_buffer_on_one_rank(comm, buffer, operation):
    with make_buffer(comm) as other:
        foreign = set_scene(other, operation).received.handle
        scene = set_scene(buffer, operation)
        error = error_of(lambda: call(scene, operation, {"handle": foreign} if comm.rank == 0 else None))
        CUPY.synchronize()
        news = error_of(buffer.check)
        if comm.rank == 0:
            assert_explains(error, HandleError, "^handle: got the handle of another Buffer; wanted one")
            assert news is None
        else:
            assert error is None
            assert type(news) is PeerError
        moe.assert_works(buffer)
        moe.assert_works(other)


def _out_of_memory(*_: object, **__: object) -> None:
    raise CapacityError("out of device memory", got="none left", wanted="some")


@pytest.mark.ranks((2, 3))
@pytest.mark.parametrize("when", ["before_the_counts", "after_the_counts", "cached_dispatch", "combine"])
def test_a_rank_without_memory(comm, when):
    """It tells the others, and the Buffer works as soon as there is memory."""
    with make_buffer(comm, 0) as buffer, pytest.MonkeyPatch.context() as patch:
        operation = when if when in ("cached_dispatch", "combine") else "dispatch"
        scene = set_scene(buffer, operation)
        if comm.rank == 1:
            if when == "after_the_counts":
                patch.setattr("epcomm.backends.cuda.dispatch.Outputs.of", _out_of_memory)
            else:
                patch.setattr("epcomm.memory.LocalPool.allocate", _out_of_memory)
        error = error_of(lambda: call(scene, operation))
        patch.undo()
        CUPY.synchronize()
        news = error_of(buffer.check)
        if comm.rank == 1:
            assert type(error) is CapacityError, repr(error)
            assert news is None, repr(news)
        else:
            hears_in_the_call = when == "before_the_counts"
            assert type(error) is (PeerError if hears_in_the_call else type(None)), repr(error)
            assert type(news) is (type(None) if hears_in_the_call else PeerError), repr(news)
        moe.assert_works(buffer)


@pytest.mark.ranks((2, 3))
def test_a_rank_that_cannot_load_the_kernels(comm):
    with pytest.MonkeyPatch.context() as patch:
        if comm.rank == 1:
            patch.setattr("epcomm.backends.cuda.job.Launcher", _out_of_memory)
        error = error_of(lambda: make_buffer(comm))
    if comm.rank == 1:
        assert type(error) is CapacityError, repr(error)
    else:
        assert_explains(error, BootstrapError, "^Buffer: got on rank 1: CapacityError: out of device memory")
    with make_buffer(comm) as buffer:
        moe.assert_works(buffer)


class Mute:
    """An array whose framework fails without a word."""

    def __dlpack_device__(self):
        raise MemoryError

    def __dlpack__(self, **_):
        raise MemoryError


@pytest.mark.ranks(2)
def test_whatever_is_raised_reaches_the_peers(comm, buffer):
    scene = set_scene(buffer, "dispatch")
    if comm.rank == 0:
        with pytest.raises(MemoryError):
            call(scene, "dispatch", {"x": Mute()})
    else:
        with raises(PeerError, r"rank 0: MemoryError\(\)"):
            call(scene, "dispatch")
    moe.assert_works(buffer)


# -- rows that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.ranks((1, 3))
@pytest.mark.parametrize("with_topk", [True, False], ids=["topk", "no_topk"])
def test_overflow_is_reported_once(comm, num_ranks, with_topk):
    """With and without indices, and again by the cached dispatch of the same handle."""
    inputs = BY_NAME["worst_overflow"].inputs(num_ranks)
    rank = comm.rank
    assert any(inputs.is_overflowing(other) for other in range(num_ranks))
    with make_buffer(comm) as buffer:
        topk_idx = CUPY.up(inputs.topk_idx[rank])
        layout = buffer.get_dispatch_layout(topk_idx, inputs.num_experts)
        options = {"topk_idx": topk_idx} if with_topk else {}
        payload = (CUPY.up(inputs.x[rank]), CUPY.up(inputs.scales[rank]))
        worst = inputs.num_worst_tokens
        result = buffer.dispatch(payload, **layout.arguments(), num_worst_tokens=worst, **options)
        for got in (result, buffer.dispatch(payload, handle=result.handle)):
            want = inputs.dispatched[rank]
            real = slice(want.num_recv_tokens)
            assert_bitwise(down(got.recv_x[0])[real], want.recv_x[real])
        CUPY.synchronize()
        if inputs.is_overflowing(rank):
            num_dropped = want.rank_prefix_matrix[-1, rank] - want.num_recv_tokens
            with pytest.raises(CapacityError, match=f"got {2 * num_dropped} rows for rank {rank} "):
                buffer.check()
        buffer.check()
        comm.barrier()
