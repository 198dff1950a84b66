"""Descriptors between ranks, and the bookkeeping of device memory with a driver of our own: no GPU."""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_driver import GRANULARITY, FakeDriver

from epcomm.arrays import ArrayView, array_spec, import_array
from epcomm.arrays.device import DeviceArray, device_array
from epcomm.arrays.streams import LEGACY, as_stream, current_stream, dlpack_stream
from epcomm.bootstrap import run_local
from epcomm.bootstrap.communicator import SoloCommunicator
from epcomm.dlpack import CUDA, DTYPES, read
from epcomm.errors import (
    BootstrapError,
    CapacityError,
    DeviceError,
    EpcommError,
    InputError,
    MissingDependency,
    PeerTimeout,
)
from epcomm.memory import driver
from epcomm.memory.descriptors import Mailbox, exchange_descriptors
from epcomm.memory.device import DeviceMemory
from epcomm.memory.symmetric import SymmetricMemory


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def memory_file(text):
    descriptor = os.memfd_create("rank")
    os.write(descriptor, text.encode())
    return descriptor


# ---- the exchange of descriptors


@pytest.mark.parametrize("size", [1, 2, 5, 24])  # 24 peers do not fit into one queue
def test_every_rank_gets_every_descriptor(size):
    def rank_main(comm):
        own = memory_file(f"rank {comm.rank}")
        received = exchange_descriptors(comm, own, 30.0)
        assert not any(os.get_inheritable(descriptor) for descriptor in received.values())
        texts = {rank: os.pread(descriptor, 99, 0).decode() for rank, descriptor in received.items()}
        for descriptor in (own, *received.values()):
            os.close(descriptor)
        return texts

    before = open_descriptors()
    for rank, texts in enumerate(run_local(size, rank_main)):
        assert texts == {peer: f"rank {peer}" for peer in range(size) if peer != rank}
    assert open_descriptors() == before


CHILD = """
import json, os, sys
from epcomm.memory.descriptors import Mailbox
rank = int(sys.argv[1])
mailbox = Mailbox()
print(json.dumps([part.hex() for part in mailbox.address]), flush=True)
peers = {int(r): tuple(bytes.fromhex(part) for part in a) for r, a in json.loads(sys.stdin.readline()).items()}
own = os.memfd_create("rank")
os.write(own, b"rank %d" % rank)
received = mailbox.exchange(own, rank, peers, 30.0)
print(json.dumps({r: os.pread(fd, 99, 0).decode() for r, fd in received.items()}))
"""


def test_between_processes():
    root = Path(__file__).parents[2]
    start = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": root}
    children = [subprocess.Popen([sys.executable, "-c", CHILD, str(rank)], **start) for rank in range(2)]
    addresses = {rank: json.loads(child.stdout.readline()) for rank, child in enumerate(children)}
    for rank, child in enumerate(children):
        child.stdin.write(json.dumps({1 - rank: addresses[1 - rank]}) + "\n")
        child.stdin.flush()
    for rank, child in enumerate(children):
        output, _ = child.communicate(timeout=60)
        assert (json.loads(output), child.returncode) == ({str(1 - rank): f"rank {1 - rank}"}, 0)


def test_a_silent_rank_is_named():
    mine, silent = Mailbox(), Mailbox()
    before = open_descriptors()
    with pytest.raises(PeerTimeout, match=r"from rank 3 after .*waiting: rank 1.*network namespace") as info:
        mine.exchange(0, 1, {3: silent.address}, 0.05)
    assert (info.value.waiting_rank, info.value.awaited_ranks) == (1, [3])
    assert open_descriptors() == before
    silent.close()
    with pytest.raises(BootstrapError, match="refused when rank 1 wrote to the socket of rank 3"):
        mine.exchange(0, 1, {3: silent.address}, 0.05)
    mine.close()


def test_messages_of_strangers_are_dropped_and_their_descriptors_closed():
    mailboxes = [Mailbox(), Mailbox()]
    before = open_descriptors()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger, Path("/dev/null").open() as null:
        name, token = mailboxes[0].address
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [null.fileno()] * 2))]
        for message in (b"", b"x" * 20, token, token + (7).to_bytes(4, "little"), token + (1).to_bytes(4, "little")):
            stranger.sendmsg([message], rights, 0, name)
    own = memory_file("rank 1")
    results = {}

    def exchange(rank):
        results[rank] = mailboxes[rank].exchange(own, rank, {1 - rank: mailboxes[1 - rank].address}, 30.0)

    thread = threading.Thread(target=exchange, args=(1,))
    thread.start()
    exchange(0)
    thread.join()
    assert os.pread(results[0][1], 99, 0) == b"rank 1"
    for descriptor in (own, results[0][1], results[1][0]):
        os.close(descriptor)
    assert open_descriptors() == before
    for mailbox in mailboxes:
        mailbox.close()


# ---- device memory, with a driver of our own


class ByMessages:
    """The ranks of a `LocalGroup` that do not know that they are threads: they map each other like processes."""

    def __init__(self, comm):
        self._comm = comm
        self.rank, self.size, self.allgather = comm.rank, comm.size, comm.allgather


@pytest.fixture
def fake(monkeypatch):
    fake = FakeDriver()
    monkeypatch.setattr(driver, "load", lambda: fake)
    monkeypatch.setattr(driver, "_contexts", {})
    before = open_descriptors()
    yield fake
    assert fake.num_open == 0
    assert open_descriptors() == before
    assert not fake._stack()


def test_allocate_export_import(fake):
    memory = DeviceMemory.allocate(1, 5, shareable=True, zeroed=True)
    assert (memory.num_bytes, memory.device, memory.ptr % GRANULARITY) == (GRANULARITY, 5, 0)
    descriptor = memory.export_fd()
    peer = DeviceMemory.import_fd(descriptor, memory.num_bytes, 6)
    os.close(descriptor)
    assert os.fstat(fake.mapped[peer.ptr]).st_ino == os.fstat(fake.mapped[memory.ptr]).st_ino
    assert fake.access == {memory.ptr: {5}, peer.ptr: {6}}
    with pytest.raises(EpcommError, match="export_fd"):
        peer.export_fd()
    for region in (memory, peer, memory):
        region.close()
    with pytest.raises(EpcommError, match="export_fd"):
        memory.export_fd()


@pytest.mark.parametrize(
    "function",
    ["cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async", "cuStreamCreate"],
)
def test_nothing_stays_open_when_the_driver_refuses(fake, function):
    fake.fail = {function: "CUDA_ERROR_INVALID_DEVICE"}
    with pytest.raises(EpcommError, match="CUDA_ERROR_INVALID_DEVICE"):
        DeviceMemory.allocate(1, 0, shareable=True, zeroed=True)


def test_import_that_is_refused(fake):
    memory = DeviceMemory.allocate(1, 0, shareable=True)
    descriptor = memory.export_fd()
    fake.fail = {"cuMemSetAccess": "CUDA_ERROR_NOT_SUPPORTED"}
    with pytest.raises(DeviceError, match=r"cuda:1: .*address each other.*nvidia-smi topo"):
        DeviceMemory.import_fd(descriptor, memory.num_bytes, 1)
    os.close(descriptor)
    memory.close()


def test_out_of_memory_says_how_much_there_is(fake):
    fake.total_bytes = GRANULARITY
    with pytest.raises(CapacityError, match=rf"{2 * GRANULARITY} bytes.*cuda:0 has free, {GRANULARITY} of"):
        DeviceMemory.allocate(GRANULARITY + 1, 0, shareable=False)
    with pytest.raises(InputError, match="num_bytes"):
        DeviceMemory.allocate(0, 0, shareable=False)


def test_without_the_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependency, match="pip install"):
        DeviceMemory.allocate(1, 0, shareable=False)


@pytest.mark.parametrize("as_rank", [ByMessages, lambda comm: comm], ids=["processes", "threads"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_ranks_map_all_regions(fake, size, as_rank):
    def identity(ptr):
        return os.fstat(fake.mapped[ptr]).st_ino

    def rank_main(comm):
        memory = SymmetricMemory(as_rank(comm), 1 + comm.rank * GRANULARITY, comm.rank)
        own = comm.allgather(identity(memory.bases[comm.rank]))
        assert [identity(base) for base in memory.bases] == own
        assert memory.sizes == [(1 + rank) * GRANULARITY for rank in range(size)]
        assert memory.num_bytes == memory.sizes[comm.rank]
        assert all(comm.rank in fake.access[base] for base in memory.bases)
        comm.barrier()
        if comm.rank == 0:  # the others go on using what it made
            memory.close()
        comm.barrier()
        assert [identity(base) for base in memory.bases] == own if comm.rank else True
        comm.barrier()
        memory.close()
        memory.close()

    run_local(size, rank_main)


@pytest.mark.parametrize("as_rank", [ByMessages, lambda comm: comm], ids=["processes", "threads"])
def test_all_ranks_raise_when_one_has_no_room(fake, as_rank):
    fake.total_bytes = 2 * GRANULARITY

    def rank_main(comm):
        with pytest.raises(CapacityError if comm.rank == 1 else BootstrapError, match="device memory") as info:
            SymmetricMemory(as_rank(comm), 3 * GRANULARITY if comm.rank == 1 else 1, 0)
        return str(info.value)

    messages = run_local(3, rank_main)
    assert "on rank 1: device memory: got a request" in messages[0]
    assert messages[0] == messages[2]


def test_all_ranks_raise_when_the_mapping_fails(fake):
    fake.fail = {"cuMemImportFromShareableHandle": "CUDA_ERROR_INVALID_VALUE"}

    def rank_main(comm):
        with pytest.raises(EpcommError, match=r"cuMemImportFromShareableHandle.*INVALID_VALUE") as info:
            SymmetricMemory(ByMessages(comm), 1, 0)
        return info.value.__notes__

    assert "rank 0 mapped the memory of rank 1" in run_local(2, rank_main)[0][0]


def test_thousands_of_buffers(fake):
    for _ in range(300):
        with SymmetricMemory(SoloCommunicator(), 1, 0):
            pass

    def rank_main(comm):
        for _ in range(50):
            with SymmetricMemory(ByMessages(comm), 1, 0):
                comm.barrier()

    run_local(2, rank_main)  # the fixture finds what is left open


# ---- arrays over device addresses (never dereferenced), and streams


def view_of(ptr=1 << 40, shape=(2,), dtype="f4", owner=None, device=0):
    return ArrayView(array_spec("", shape, None, np.dtype(dtype), (CUDA, device)), ptr, owner)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_device_array_is_offered_with_its_device_and_dtype(dtype):
    array = device_array("dlpack", view_of(shape=(4, 6), dtype=dtype, owner=object(), device=3), None)
    assert array.__dlpack_device__() == (CUDA, 3)
    tensor = read(array, "x")
    assert (tensor.ptr, tensor.shape, tensor.dtype, tensor.device) == (1 << 40, (4, 6), dtype, (CUDA, 3))
    again = import_array(array, "x", stream=0)
    assert (again.framework, again.ptr, again.dtype, again.device) == ("dlpack", 1 << 40, dtype, (CUDA, 3))
    known = dtype.kind in "iub" or dtype in (np.float16, np.float32, np.float64)
    assert hasattr(array, "__cuda_array_interface__") == known
    if known:
        interface = array.__cuda_array_interface__
        assert (interface["data"], interface["shape"], interface["typestr"]) == ((1 << 40, False), (4, 6), dtype.str)


class Owner:
    def __init__(self):
        self.readers, self.num_hidden = [], 0

    def note_reader(self, stream, keep=None):
        self.readers.append(stream)

    def note_hidden_reader(self):
        self.num_hidden += 1


def test_the_owner_hears_of_every_stream(monkeypatch):
    orders = []
    monkeypatch.setattr("epcomm.arrays.device.order", lambda first, then, device: orders.append((first, then, device)))
    owner = Owner()
    array = DeviceArray(view_of(dtype="i1", owner=owner, device=1), 7)
    for stream in (None, 1, 2, 7, 99):
        array.__dlpack__(stream=stream)
    assert owner.readers == [LEGACY, 1, 2, 7, 99]
    assert orders == [(7, 1, 1), (7, 1, 1), (7, 2, 1), (7, 99, 1)]
    assert owner.num_hidden == 0
    array.__dlpack__(stream=-1)
    assert array.__cuda_array_interface__["stream"] == 7
    assert (owner.num_hidden, len(orders), len(owner.readers)) == (2, 4, 5)


def test_a_capsule_keeps_the_owner():
    class Memory:
        pass

    owner = Memory()
    alive = weakref.ref(owner)
    capsule = device_array("dlpack", view_of(owner=owner), None).__dlpack__()
    del owner
    assert alive() is not None
    del capsule
    assert alive() is None


def test_device_arrays_that_cannot_be_made():
    with pytest.raises(DeviceError):
        device_array("numpy", view_of(), None)
    with pytest.raises(InputError, match="framework 'tinygrad'"):
        device_array("tinygrad", view_of(), None)
    with pytest.raises(InputError, match="dtype complex64"):
        device_array("dlpack", view_of(dtype="c8"), None)


class CudaStream:
    def __cuda_stream__(self):
        return (0, 12)


class TorchStream:
    cuda_stream = 13


class CupyStream:
    ptr = 14


def test_streams_by_name():
    given = [0, np.int64(5), CudaStream(), TorchStream(), CupyStream()]
    assert [as_stream(stream) for stream in given] == [0, 5, 12, 13, 14]
    for wrong in (None, "0", -1, True, 1.5):
        with pytest.raises(InputError, match="stream: got"):
            as_stream(wrong)
    assert [dlpack_stream(stream) for stream in (None, 0, 1, 2, -1, 77)] == [1, 1, 1, 2, None, 77]
    for wrong in ("1", -2):
        with pytest.raises(BufferError):
            dlpack_stream(wrong)
    assert current_stream("jax", 0) is None


class Producer:
    """A producer on a CUDA device, which is asked for one stream."""

    def __init__(self, array, stream):
        self._array, self._stream = array, stream

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **keywords):
        assert stream == self._stream
        return self._array.__dlpack__(**keywords)


@pytest.mark.parametrize(("stream", "asked"), [(None, None), (0, 1), (1, 1), (77, 77)])
def test_import_asks_for_our_stream(stream, asked):
    array = device_array("dlpack", view_of(), None)
    assert import_array(Producer(array, asked), "x", stream=stream).ptr == 1 << 40
    host = np.ones(3)  # a CPU producer is not asked for a stream
    assert import_array(Producer(host, None), "x", stream=stream).ptr == host.ctypes.data
