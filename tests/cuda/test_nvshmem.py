"""NVSHMEM on GPUs: ranks meet, address each other's heap, and send messages with signals that arrive bit for bit.

On one host they reach each other by plain stores; what a network card does, needs several.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from helpers.gpu import device_of_rank, emulated, need_gpu
from helpers.nvrtc import needs_nvshmem

from epcomm.backends.cuda.network import NetworkProbe
from epcomm.bootstrap import Communicator
from epcomm.errors import BufferBroken, CapacityError, RankMismatch, UnsupportedOption
from epcomm.jit import nvshmem_version
from epcomm.memory.nvshmem import NvshmemGroup, nvshmem_group

cupy = need_gpu()
pytestmark = [pytest.mark.gpu, needs_nvshmem]

MIB = 1 << 20
HEAP_BYTES = 64 * MIB
# Bytes of a message, and rounds.
MESSAGES = [(16, 200), (4096, 200), (14336, 200), (1 * MIB + 16, 20), (16 * MIB, 5)]


def world(comm: Communicator) -> NvshmemGroup:
    """NVSHMEM among all ranks of the job: whichever test comes first starts it."""
    return nvshmem_group(comm, device_of_rank(), HEAP_BYTES)


def over(ptr: int, num_bytes: int, dtype: Any = np.uint8) -> Any:
    """What lies there, as a CuPy array that owns nothing."""
    device = device_of_rank()
    memory = cupy.cuda.UnownedMemory(ptr, num_bytes, None, device)
    dtype = np.dtype(dtype)
    return cupy.ndarray((num_bytes // dtype.itemsize,), dtype, cupy.cuda.MemoryPointer(memory, 0))


def assert_runs_well(ring: NetworkProbe, num_bytes: int, num_rounds: int, **options: Any) -> np.ndarray:
    """Run; compare the last message on the host, too. The times of the rounds."""
    result = ring.run(num_bytes, num_rounds, **options)
    assert result.problem == ""
    assert result.num_done == num_rounds == len(result.elapsed_ns)
    assert (result.elapsed_ns > 0).all()
    assert (over(ring.received, num_bytes, np.uint64).get() == ring.expected(num_bytes)).all()
    return result.elapsed_ns


@pytest.mark.ranks((2, 4, 8))
def test_ranks_are_pes(comm: Communicator) -> None:
    group = world(comm)
    assert (group.pe, group.num_pes) == (comm.rank, comm.size)
    assert group.pe_of_rank == tuple(range(comm.size))
    assert group.version == nvshmem_version()
    again = world(comm)
    assert again.pe_of_rank == group.pe_of_rank


@pytest.mark.ranks((2, 4, 8))
def test_peers_on_the_host_address_the_heap(comm: Communicator) -> None:
    group = world(comm)
    address = group.allocate(comm.size * 512)
    assert address % 512 == 0
    for pe in range(comm.size):
        peer = group.ptr(address, pe)
        assert peer != 0
        assert (peer == address) == (pe == comm.rank)
        over(peer + 512 * comm.rank, 512).fill(1 + comm.rank + 10 * pe)
    cupy.cuda.Device().synchronize()
    comm.barrier()
    own = over(address, comm.size * 512).get().reshape(comm.size, 512)
    assert (own == 1 + np.arange(comm.size)[:, None] + 10 * comm.rank).all()
    comm.barrier()
    group.free(address)


@pytest.mark.ranks((2, 4, 8))
@pytest.mark.parametrize("by_block", [False, True], ids=["warp", "block"])
def test_messages_around_the_ring(comm: Communicator, by_block: bool) -> None:
    ring = NetworkProbe(comm, world(comm), 16 * MIB)
    for num_bytes, num_rounds in MESSAGES[: 4 if emulated() else None]:
        for _ in range(3):
            times = assert_runs_well(ring, num_bytes, num_rounds, by_block=by_block)
        if comm.rank == 0:
            print(f"{num_bytes} bytes there and a word back: {np.median(times) / 1e3:.1f} us")
    ring.close()


@pytest.mark.ranks((2, 4, 8))
def test_rings_of_some_ranks_at_once(comm: Communicator) -> None:
    """Even and odd ranks, in descending order; then all of them again."""
    group = world(comm)
    before = NetworkProbe(comm, group, 4096)
    some = comm.split(comm.rank % 2, key=-comm.rank)
    part = nvshmem_group(some, device_of_rank(), HEAP_BYTES)
    assert (part.pe, part.num_pes) == (comm.rank, comm.size)
    assert part.pe_of_rank == tuple(range(comm.size - 2 + comm.rank % 2, -1, -2))
    ring = NetworkProbe(some, part, 14336)
    for _ in range(3):
        assert_runs_well(ring, 14336, 50)
        comm.barrier()
        assert_runs_well(before, 4096, 50)
    ring.close()
    before.close()


@pytest.mark.ranks((2, 4))
def test_memory_is_zeroed_and_the_heap_grows(comm: Communicator) -> None:
    group = world(comm)
    first = group.allocate(8 * MIB)
    over(first, 8 * MIB).fill(255)
    cupy.cuda.Device().synchronize()
    comm.barrier()
    group.free(first)
    assert group.allocate(8 * MIB) == first
    assert not over(first, 8 * MIB).any()
    large = group.allocate(2 * HEAP_BYTES)
    assert not over(large, 2 * HEAP_BYTES).any()
    ring = NetworkProbe(comm, group, 4096)
    assert_runs_well(ring, 4096, 20)
    # A block of its own, with the same offsets on all ranks.
    peer = (comm.rank + 1) % comm.size
    over(group.ptr(large, peer) + 2 * HEAP_BYTES - 16, 16).fill(1 + comm.rank)
    cupy.cuda.Device().synchronize()
    comm.barrier()
    assert (over(large + 2 * HEAP_BYTES - 16, 16).get() == 1 + (comm.rank - 1) % comm.size).all()
    comm.barrier()
    ring.close()
    group.free(first)
    group.free(large)


@pytest.mark.ranks(2)
def test_what_cannot_be_allocated(comm: Communicator) -> None:
    group = world(comm)
    alone = nvshmem_group(comm.split(comm.rank, 0), device_of_rank(), 1)
    assert alone.pe_of_rank == (comm.rank,)
    with pytest.raises(CapacityError, match="set NVSHMEM_SYMMETRIC_SIZE to"):
        alone.allocate(1 << 40)
    with pytest.raises(RankMismatch, match="num_bytes"):
        group.allocate(512 * (1 + comm.rank))
    comm.barrier()


@pytest.mark.ranks(2)
def test_a_peer_that_does_not_come_ends_the_wait(comm: Communicator) -> None:
    group = world(comm)
    ring = NetworkProbe(comm, group, 4096)
    assert_runs_well(ring, 4096, 5)
    comm.barrier()
    if comm.rank == 0:
        begin = time.monotonic()
        result = ring.run(4096, 5, timeout_s=0.5)
        assert 0.5 <= time.monotonic() - begin < 10
        assert result.problem.startswith(
            "the message of the previous rank did not come (PE 1) within 0.5 s, in round 1"
        )
        assert (result.num_done, result.elapsed_ns.size) == (0, 0)
        with pytest.raises(BufferBroken, match="an earlier run that ended badly"):
            ring.run(4096, 5)
        assert int(cupy.arange(10).sum()) == 45  # the context is as good as before
    ring.close()
    # A ring in other memory works.
    again = NetworkProbe(comm, group, 4096)
    assert_runs_well(again, 4096, 5)
    again.close()


@pytest.mark.ranks(2, isolated=True)
def test_ranks_that_were_not_there(comm: Communicator) -> None:
    """NVSHMEM starts with rank 0 alone, so it cannot have rank 1; and nothing hangs at the end."""
    if comm.rank == 0:
        alone = nvshmem_group(comm.split(0, 0), device_of_rank(), MIB)
        ring = NetworkProbe(comm.split(0, 0), alone, 4096)
        assert_runs_well(ring, 4096, 5)
    else:
        comm.split(1, 0)
        comm.split(1, 0)
    with pytest.raises(UnsupportedOption, match="ranks 1 of this Buffer, which did not start it together with rank 0"):
        nvshmem_group(comm, device_of_rank(), MIB)
    comm.barrier()


@pytest.mark.ranks(2, isolated=True)
def test_nothing_needs_to_be_given_back(comm: Communicator) -> None:
    """The processes end with memory, a module and NVSHMEM itself as they are; that must not take long."""
    ring = NetworkProbe(comm, world(comm), 4096)
    assert_runs_well(ring, 4096, 5)
    if comm.rank == 1:
        time.sleep(1.0)
    # A peer that has gone leaves this rank's memory alone.
    assert (over(ring.received, 4096, np.uint64).get() == ring.expected(4096)).all()
