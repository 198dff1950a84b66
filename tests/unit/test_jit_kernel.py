"""Loading and launching, with a CuPy that only writes down what it is asked; and who fits on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import types

import pytest

from epcomm.errors import CapacityError, CompileError, MissingDependency
from epcomm.jit import device, kernel, overlap
from epcomm.jit.kernel import Kernel
from epcomm.jit.residency import Footprint, Launch, plan_residency


class FakeDriver:
    """The calls of ``cupy.cuda.driver`` that are used; a cubin is a text that lists its functions."""

    class CUDADriverError(RuntimeError):
        pass

    def __init__(self) -> None:
        self.modules: list[bytes] = []
        self.functions: list[str] = []
        self.launches: list[tuple] = []
        self.settings: list[tuple[int, int, int]] = []
        self.context = 0
        self.capability, self.version = "90", 12030

    def ctxGetCurrent(self):
        return self.context

    def moduleLoadData(self, cubin):
        assert self.context
        self.modules.append(cubin)
        return len(self.modules)

    def moduleGetFunction(self, module, name):
        if name.encode() not in self.modules[module - 1].split():
            raise self.CUDADriverError("CUDA_ERROR_NOT_FOUND: named symbol not found")
        self.functions.append(name)
        return 100 * module + len(self.functions)

    def funcGetAttribute(self, attribute, function):
        return {0: 512, 1: 64, 3: 0, 4: 40}[attribute]

    def funcSetAttribute(self, function, attribute, value):
        if attribute == 8 and value > 232448:
            raise self.CUDADriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        self.settings.append((function, attribute, value))

    def occupancyMaxActiveBlocksPerMultiprocessor(self, function, threads, shared_bytes):
        return 232448 // max(shared_bytes, 1024)

    def launchKernel(self, function, *numbers):
        *shape, stream, parameters, extra = numbers
        pointer = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        argument = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0]
        self.launches.append((function, tuple(shape), stream, argument, extra))


@pytest.fixture
def driver(monkeypatch):
    fake = FakeDriver()

    class Device:
        def __init__(self, number: int) -> None:
            self.number, self.compute_capability = number, fake.capability

        def __enter__(self) -> None:
            entered.append(self.number)

        def __exit__(self, *_) -> None:
            entered.append(None)

    def free(address: int) -> None:
        assert address == 0
        fake.context = 1

    entered: list[int | None] = []
    runtime = types.SimpleNamespace(
        free=free,
        deviceGetAttribute=lambda number, device: {16: 132}[number],
        driverGetVersion=lambda: fake.version,
        getDeviceProperties=lambda device: {"uuid": bytes([device]) * 16 + b"\0"},
    )
    fake.entered = entered
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(driver=fake, runtime=runtime, Device=Device))
    for module in (device, kernel, overlap):
        monkeypatch.setattr(module, "load_cupy", lambda: cupy)
    monkeypatch.setattr(kernel, "_modules", {})
    return fake


def test_launch(driver):
    move = Kernel(b"count move", "move", 3)
    arguments = ctypes.c_int(42)
    move.launch(16, 512, 1000, 77, ctypes.addressof(arguments))
    arguments.value = 43
    move.launch(1, 32, 0, 0, ctypes.addressof(arguments))
    assert driver.launches == [
        (101, (16, 1, 1, 512, 1, 1, 1000), 77, 42, 0),
        (101, (1, 1, 1, 32, 1, 1, 0), 0, 43, 0),
    ]


def test_kernels_of_a_cubin_are_in_one_module(driver):
    assert [Kernel(b"count move", name, 0).module for name in ("count", "move")] == [1, 1]
    assert Kernel(b"sum", "sum", 0).module == 2


class FakeBindings:
    """What is used of ``cuda.bindings.driver`` to launch."""

    CUlaunchAttributeID = types.SimpleNamespace(CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6)
    CUlaunchConfig = types.SimpleNamespace

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.status = 0

    @staticmethod
    def CUlaunchAttribute():
        return types.SimpleNamespace(value=types.SimpleNamespace())

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        (attribute,) = config.attrs
        assert (config.numAttrs, attribute.id, vars(attribute.value)) == (
            *(1, 6),
            {"programmaticStreamSerializationAllowed": 1},
        )
        pointer = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        argument = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0]
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        block = config.blockDimX, config.blockDimY, config.blockDimZ
        self.launches.append((function, (*grid, *block, config.sharedMemBytes), config.hStream, argument, extra))
        return (self.status,)


@pytest.fixture
def bindings(monkeypatch):
    fake = FakeBindings()
    monkeypatch.setitem(sys.modules, "cuda", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.SimpleNamespace(driver=fake))
    return fake


def test_launches_that_overlap(driver, bindings):
    move = Kernel(b"count move", "move", 3, overlaps=True)
    argument = ctypes.c_int(42)
    shapes = [(16, 512, 1000, 77), (16, 512, 1000, 78), *[(blocks, 32, 0, 0) for blocks in range(1, 100)]]
    for shape in 2 * shapes:
        move.launch(*shape, ctypes.addressof(argument))
    assert bindings.launches == 2 * [
        (101, (blocks, 1, 1, threads, 1, 1, shared_bytes), stream, 42, 0)
        for blocks, threads, shared_bytes, stream in shapes
    ]
    assert not driver.launches
    bindings.status = 719
    with pytest.raises(driver.CUDADriverError, match="719"):
        move.launch(16, 512, 1000, 77, ctypes.addressof(argument))


@pytest.mark.parametrize(("capability", "version"), [("89", 13000), ("90", 12020)])
def test_launches_that_could_overlap_elsewhere(driver, bindings, capability, version):
    driver.capability, driver.version = capability, version
    Kernel(b"move", "move", 0, overlaps=True).launch(1, 32, 0, 0, ctypes.addressof(ctypes.c_int(42)))
    assert (len(driver.launches), len(bindings.launches)) == (1, 0)


def test_loading_happens_on_the_device_with_a_context(driver):
    move = Kernel(b"move", "move", 3)
    assert driver.entered == [3, None]
    assert driver.context
    assert (move.entry, move.device) == ("move", 3)
    assert (move.max_threads, move.registers, move.static_shared_bytes, move.local_bytes) == (512, 40, 64, 0)
    assert "move" in repr(move)


def test_a_cubin_is_loaded_once_a_device_and_stays(driver):
    first = Kernel(b"count move", "move", 0)
    assert Kernel(b"count move", "count", 0)._function != first._function
    del first
    Kernel(b"count move", "move", 0)
    assert driver.modules == [b"count move"]
    Kernel(b"count move", "move", 1)
    Kernel(b"move", "move", 0)
    assert driver.modules == [b"count move", b"count move", b"move"]


def test_kernels_have_arguments_of_their_own(driver):
    first, second = (Kernel(b"move", "move", 0) for _ in range(2))
    assert first._parameters_address != second._parameters_address


def test_a_function_that_is_not_there(driver):
    with pytest.raises(CompileError, match=r"^combine: got CUDA_ERROR_NOT_FOUND.*; wanted a function that device 2"):
        Kernel(b"move", "combine", 2)


def test_shared_memory(driver):
    move = Kernel(b"move", "move", 0)
    move.allow_shared(200 << 10)
    assert [(attribute, value) for _, attribute, value in driver.settings] == [(8, 200 << 10), (9, 100)]
    assert move.blocks_per_sm(512, 100 << 10) == 2
    with pytest.raises(CapacityError, match=r"^move: shared memory: got 300000 bytes beside 64 static ones; wanted"):
        move.allow_shared(300000)


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    device.load_cupy.cache_clear()
    with pytest.raises(MissingDependency, match=r"^cupy: .*pip install 'epcomm\[cuda13\]'"):
        Kernel(b"", "move", 0)
    device.load_cupy.cache_clear()


def test_cupy_has_what_is_used_of_it():
    pytest.importorskip("cupy", reason="optional package cupy is not installed (extra cuda12 or cuda13)")
    cuda = device.load_cupy().cuda
    missing = [name for name in vars(FakeDriver) if not name.startswith("_") and not hasattr(cuda.driver, name)]
    missing += [
        name
        for name in ("free", "deviceGetAttribute", "driverGetVersion", "getDeviceProperties")
        if not hasattr(cuda.runtime, name)
    ]
    assert missing == []


def test_cuda_bindings_have_what_is_used_of_them():
    driver = pytest.importorskip("cuda.bindings.driver", reason="optional package cuda-bindings is not installed")
    launch = overlap.OverlappingLaunch(0)
    config = launch._make((16, 512, 1000, 77))
    assert (config.gridDimX, config.blockDimX, config.sharedMemBytes, int(config.hStream)) == (16, 512, 1000, 77)
    assert config.attrs[0].value.programmaticStreamSerializationAllowed == 1
    assert callable(driver.cuLaunchKernelEx)


def test_facts_about_a_device(driver):
    assert device.device_architecture(0) == "90"
    assert device.device_uuid(2) == "02" * 16
    assert device.num_sms(0) == 132


# -- residency ----------------------------------------------------------------------------------------------------


def ranks(num_ranks: int, *launches: tuple[int, int], num_sms: int = 132, uuid: str = "gpu0") -> list[Footprint]:
    return [Footprint(uuid, num_sms, tuple(Launch(*launch) for launch in launches))] * num_ranks


@pytest.mark.parametrize(
    "footprints",
    [
        ranks(8, (16, 1)),
        ranks(1, (132, 1)),
        ranks(4, (33, 1)),
        ranks(8, (16, 2), (16, 2)),
        ranks(1, (66, 1), (66, 4)),
        [*ranks(4, (33, 1)), *ranks(4, (33, 1), uuid="gpu1")],
        ranks(8, (2, 1), num_sms=16),
        ranks(8),
        [],
    ],
    ids=[
        "8x16",
        "alone",
        "exactly",
        "two_operations_two_blocks_an_sm",
        "mixed",
        "two_gpus",
        "mps_partitions",
        "nothing_waits",
        "nobody",
    ],
)
def test_what_fits(footprints):
    plan_residency(footprints)


@pytest.mark.parametrize(
    ("footprints", "message"),
    [
        (ranks(8, (17, 1)), r"set_num_sms\(16\) or less on these ranks$"),
        (ranks(8, (16, 1), (16, 1)), r"got 256 blocks of 16 operations.*; wanted at most 132, 1 on each of 132 SMs"),
        (ranks(8, (16, 1), (16, 1)), r"set_num_sms\(8\)"),
        (ranks(1, (67, 1), (66, 4)), r"set_num_sms\(66\)"),  # the small blocks may lie on all SMs
        (ranks(200, (1, 1)), "put fewer ranks on a GPU$"),
        (ranks(2, (9, 1), num_sms=16), r"set_num_sms\(8\)"),
        (ranks(1, (1, 0)), "put fewer ranks on a GPU$|wanted at most 0"),
        ([*ranks(2, (16, 1)), *ranks(2, (67, 1), uuid="gpu1")], "^the GPU gpu1 of ranks 2, 3: got 134 blocks"),
        ([*ranks(1, (100, 1)), *ranks(1, (100, 1), num_sms=50)], r"wanted at most 50.*set_num_sms\(25\)"),
    ],
)
def test_what_does_not_fit(footprints, message):
    with pytest.raises(CapacityError, match=message):
        plan_residency(footprints)


def test_placement_by_brute_force():
    """Whatever order blocks of two kinds come in and wherever they are put, an allowed set leaves none outside."""

    def fits(free: tuple[int, ...], left: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
        """Every sequence of placements ends with all blocks placed; `free` and `sizes` in sixths of an SM."""
        if not any(left):
            return True
        for kind, count in enumerate(left):
            places = {room for room in free if room >= sizes[kind]}
            if count and not places:
                return False
            for room in places if count else ():
                rest = list(free)
                rest.remove(room)
                after = tuple(sorted([*rest, room - sizes[kind]]))
                fewer = tuple(n - (k == kind) for k, n in enumerate(left))
                if not fits(after, fewer, sizes):
                    return False
        return True

    num_sms, per_sm = 2, {1: 6, 2: 3, 3: 2}
    for first, first_size in per_sm.items():
        for second, second_size in per_sm.items():
            for counts in ((1, 1), (1, 2), (2, 2), (1, 3), (3, 1), (2, 4)):
                launches = tuple(Launch(*pair) for pair in zip(counts, (first, second), strict=True))
                with contextlib.suppress(CapacityError):
                    plan_residency([Footprint("g", num_sms, launches)])
                    assert fits((6,) * num_sms, counts, (first_size, second_size)), (counts, first, second)


def test_all_ranks_of_a_gpu_count():
    def plan(blocks, uuids):
        plan_residency([Footprint(uuid, 132, (Launch(blocks, 1),)) for uuid in uuids])

    plan(16, "aaa")
    with pytest.raises(CapacityError, match="of ranks 0, 1, 2: got 135 blocks"):
        plan(45, "aaa")
    plan(45, "abc")  # a GPU each
