"""Arrays without any framework but NumPy: import, export, requirements, and the DLPack ABI against crafted capsules."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from epcomm import dlpack
from epcomm.arrays import array_spec, empty, export_array, framework_of, import_array, require
from epcomm.dlpack import CPU, CUDA, DTYPES, Exporter, ndarray_over, read
from epcomm.errors import DeviceError, DtypeError, InputError, LayoutError, ShapeError

ROOT = Path(__file__).parents[2]
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
BF16 = np.dtype(ml_dtypes.bfloat16)


def pattern(dtype, shape=(4, 6)):
    """An aligned array whose bytes depend on their position only; booleans are 0 or 1."""
    a = empty(shape, dtype)
    octets = a.reshape(-1).view(np.uint8)
    octets[:] = np.arange(octets.size) % (2 if a.dtype == bool else 251)
    return a


class Producer:
    """A DLPack producer that hands out NumPy's capsule after `edit` has changed it."""

    def __init__(self, array, edit=None, device=(1, 0)):
        self.array, self.edit, self.device = array, edit, device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, max_version=None):
        capsule = self.array.__dlpack__(max_version=max_version)
        if self.edit is not None:
            pointer = dlpack._capsule_pointer(capsule, b"dltensor_versioned")
            self.edit(dlpack._ManagedVersioned.from_address(pointer))
        return capsule


class OldProducer(Producer):
    """From before DLPack 1.0: no max_version."""

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


class Owner:
    """Something that can be watched while it keeps memory alive."""

    def __init__(self, memory):
        self.memory = memory


# ---- import and export of NumPy arrays


@ALL_DTYPES
@pytest.mark.parametrize("layout", ["row_major", "zero_size", "column_major", "scalar", "reversed"])
def test_numpy_round_trip(dtype, layout):
    a = {
        "row_major": lambda: pattern(dtype),
        "zero_size": lambda: pattern(dtype, (0, 6)),
        "column_major": lambda: pattern(dtype).T,
        "scalar": lambda: pattern(dtype, ()),
        "reversed": lambda: pattern(dtype)[::-1],
    }[layout]()
    view = import_array(a, "x")
    assert view.framework == "numpy"
    assert (view.shape, view.dtype, view.device, view.readonly) == (a.shape, dtype, (CPU, 0), False)
    assert view.strides == tuple(step // dtype.itemsize for step in a.strides)
    assert view.ptr == a.ctypes.data
    assert view.on_cpu
    assert view.contiguous == a.flags.c_contiguous
    back = view.numpy()
    assert (back.dtype, back.shape, back.strides, back.ctypes.data) == (a.dtype, a.shape, a.strides, a.ctypes.data)
    assert export_array(a, "numpy") is a
    assert export_array(a, "dlpack") is a


def test_numpy_view_keeps_the_source_and_nothing_else_does():
    a = np.arange(6.0)
    source = weakref.ref(a)
    host = import_array(a, "x").numpy()
    del a
    assert source() is not None
    assert host.tolist() == [0, 1, 2, 3, 4, 5]
    del host
    assert source() is None


def test_memmap_is_taken_as_plain_array(tmp_path):
    mapped = np.memmap(tmp_path / "rows", np.float32, "w+", shape=(3, 2))
    view = import_array(mapped, "x", writable=True)
    assert view.ptr == mapped.ctypes.data
    assert type(view.numpy()) is np.ndarray
    view.numpy()[1, 1] = 7
    assert mapped[1, 1] == 7


def test_read_only_numpy_is_fine_until_it_must_be_written():
    a = np.arange(4)
    a.flags.writeable = False
    view = import_array(a, "x")
    assert view.readonly
    assert not view.numpy().flags.writeable
    with pytest.raises(InputError, match="out: got a read-only array"):
        import_array(a, "out", writable=True)


@pytest.mark.parametrize(
    "dtype", ["O", "S3", "U2", "M8[s]", "c16", "V5", [("a", "f4")], ml_dtypes.int4, "g"], ids=lambda d: str(np.dtype(d))
)
def test_numpy_dtypes_that_are_refused(dtype):
    with pytest.raises(DtypeError, match=r"^x: got dtype .*; wanted one of .*bfloat16"):
        import_array(np.zeros(2, dtype), "x")


@pytest.mark.parametrize("dtype", [">f4", ">i8", ">u2"])
def test_byte_swapped_numpy_is_refused(dtype):
    with pytest.raises(DtypeError, match=f"byte-swapped dtype {dtype}.*newbyteorder"):
        import_array(np.zeros(2, dtype), "x")


def test_strides_inside_a_record_are_refused():
    records = np.zeros(3, [("a", "f4"), ("b", "u2")])
    with pytest.raises(LayoutError, match=r"strides of \[6\] bytes for elements of 4 bytes"):
        import_array(records["a"], "x")


def test_masked_array_is_refused():
    with pytest.raises(InputError, match="masked array"):
        import_array(np.ma.masked_array([1, 2], mask=[0, 1]), "x")


@pytest.mark.parametrize("thing", [[1, 2], (1,), None, 3, 2.5, "text", np.float32(1), np.ndarray], ids=repr)
def test_things_that_are_no_arrays(thing):
    with pytest.raises(DtypeError, match="wanted an array of NumPy, CuPy, JAX or PyTorch"):
        framework_of(thing)
    with pytest.raises(DtypeError, match=r"^topk_idx: got a "):
        import_array(thing, "topk_idx")


def test_framework_of():
    assert framework_of(np.zeros(1)) == "numpy"
    assert framework_of(np.ma.masked_array([1])) == "numpy"
    assert framework_of(Producer(np.zeros(1))) == "dlpack"


def test_cupy_array_by_attributes():
    """With a stand-in that has the documented attributes of cupy.ndarray."""

    class Pointer:
        ptr, device_id = 0x7F0000000200, 3

    stand_in = type("ndarray", (), {"__module__": "cupy"})
    x = stand_in()
    x.dtype, x.shape, x.strides, x.data = BF16, (4, 6), (12, 2), Pointer()
    assert framework_of(x) == "cupy"
    view = import_array(x, "x", writable=True)
    assert (view.framework, view.ptr, view.shape, view.strides) == ("cupy", Pointer.ptr, (4, 6), (6, 1))
    assert (view.dtype, view.device, view.readonly, view.owner) == (BF16, (CUDA, 3), False, x)
    with pytest.raises(DeviceError, match=r"got an array on cuda:3.*pass backend='cuda' or move the array"):
        view.numpy()


@pytest.mark.parametrize(
    ("framework", "error", "message"),
    [
        ("cupy", DeviceError, "wanted an array on cuda"),
        ("paddle", InputError, "wanted numpy, torch, jax, cupy or dlpack; correct the name"),
    ],
)
def test_frameworks_that_cannot_be_exported_to(framework, error, message):
    with pytest.raises(error, match=message):
        export_array(np.zeros(2), framework)


def test_framework_that_was_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(InputError, match="import torch first"):
        export_array(np.zeros(2), "torch")


# ---- other DLPack producers


@ALL_DTYPES
@pytest.mark.parametrize("kind", ["versioned", "unversioned"])
@pytest.mark.parametrize("layout", ["row_major", "zero_size", "column_major"])
def test_dlpack_round_trip(dtype, kind, layout):
    a = {
        "row_major": lambda: pattern(dtype),
        "zero_size": lambda: pattern(dtype, (0, 6)),
        "column_major": lambda: pattern(dtype).T,
    }[layout]()
    exporter = Exporter(a, dtype)
    if kind == "unversioned":
        view = import_array(OldProducer(exporter), "x")
    else:
        view = import_array(exporter, "x")
        assert b"dltensor_versioned" in repr(view.owner).encode()
    assert (view.framework, view.ptr, view.shape, view.dtype) == ("dlpack", a.ctypes.data, a.shape, a.dtype)
    assert view.strides == tuple(step // dtype.itemsize for step in a.strides)
    back = view.numpy()
    assert back.dtype == dtype
    assert back.tobytes() == a.tobytes()
    assert back.size == 0 or back.ctypes.data == a.ctypes.data


@pytest.mark.parametrize("producer_type", [Producer, OldProducer])
def test_dlpack_memory_lives_as_long_as_the_last_view(producer_type):
    owner = Owner(pattern(np.uint16))
    source = weakref.ref(owner)
    a = ndarray_over(owner.memory.ctypes.data, (4, 6), np.dtype(np.uint16), owner=owner)
    expected = a[1:].copy()
    part = import_array(producer_type(a), "x").numpy()[1:]
    del a, owner
    gc.collect()
    assert source() is not None
    assert np.array_equal(part, expected)
    del part
    assert source() is None


def test_dlpack_deleter_runs_once():
    """A second run would drop a reference of the array that is not the capsule's."""
    a = pattern(np.int32)
    before = sys.getrefcount(a)
    for _ in range(3):
        view = import_array(Producer(a), "x")
        assert sys.getrefcount(a) == before + 1
        del view
        assert sys.getrefcount(a) == before


def test_dlpack_offset_and_null_strides():
    a = pattern(np.float32)

    def edit(managed):
        managed.tensor.data -= 64
        managed.tensor.byte_offset = 64
        managed.tensor.strides = None

    view = import_array(Producer(a, edit), "x")
    assert (view.ptr, view.strides) == (a.ctypes.data, (6, 1))


def test_dlpack_device_of_the_producer():
    view = import_array(Exporter(pattern(BF16), BF16, (CUDA, 5)), "x")
    assert (view.device, view.on_cpu) == ((CUDA, 5), False)
    with pytest.raises(DeviceError, match="cuda:5"):
        view.numpy()


@pytest.mark.parametrize("flag", [1, 2], ids=["read_only", "copied"])
def test_dlpack_flags(flag):
    def edit(managed):
        managed.flags = flag

    producer = Producer(pattern(np.float32), edit)
    view = import_array(producer, "x")
    assert view.readonly
    assert not view.numpy().flags.writeable
    with pytest.raises(InputError, match="out: got a read-only array"):
        import_array(producer, "out", writable=True)


def test_dlpack_writable_reaches_the_source():
    a = pattern(np.float32)
    import_array(Producer(a), "out", writable=True).numpy()[2, 3] = -5
    assert a[2, 3] == -5


def _set_code(managed, code, bits, lanes):
    managed.tensor.dtype.code, managed.tensor.dtype.bits, managed.tensor.dtype.lanes = code, bits, lanes


@pytest.mark.parametrize(
    "code", [(5, 64, 1), (0, 4, 1), (17, 4, 1), (2, 32, 4)], ids=["complex64", "int4", "float4", "float32x4"]
)
def test_dlpack_dtypes_that_are_refused(code):
    producer = Producer(pattern(np.float32), lambda managed: _set_code(managed, *code))
    with pytest.raises(DtypeError, match=f"x: got DLPack type code {code[0]}, {code[1]} bits, {code[2]} lanes"):
        import_array(producer, "x")


def test_dlpack_major_version_of_the_future():
    a = pattern(np.float32)
    before = sys.getrefcount(a)
    with pytest.raises(InputError, match=r"DLPack version 2\.0; wanted 1\.x"):
        import_array(Producer(a, lambda managed: setattr(managed, "major", 2)), "x")
    gc.collect()
    assert sys.getrefcount(a) == before  # the deleter has run


@pytest.mark.parametrize("error", [BufferError, RuntimeError, ValueError])
def test_dlpack_producer_that_refuses(error):
    class Refusing(Producer):
        def __dlpack__(self, *, max_version=None):
            raise error("strided")

    with pytest.raises(InputError, match=r"got Refusing, which refuses DLPack export \(strided\)"):
        import_array(Refusing(np.zeros(1)), "x")


def test_dlpack_producer_without_a_capsule():
    class Wrong(Producer):
        def __dlpack__(self, *, max_version=None):
            return 3

    with pytest.raises(InputError, match="got 3 from __dlpack__; wanted an unused DLPack capsule"):
        import_array(Wrong(np.zeros(1)), "x")


# ---- Exporter and ndarray_over


def test_exporter_gives_the_capsule_that_is_asked_for():
    exporter = Exporter(pattern(BF16), BF16, (CPU, 0))
    assert exporter.__dlpack_device__() == (CPU, 0)
    assert '"dltensor"' in repr(exporter.__dlpack__())
    assert '"dltensor"' in repr(exporter.__dlpack__(stream=None, max_version=(0, 8)))
    assert '"dltensor_versioned"' in repr(exporter.__dlpack__(max_version=(1, 3), dl_device=(CPU, 0), copy=False))


@pytest.mark.parametrize("request_", [{"copy": True}, {"dl_device": (CUDA, 0)}], ids=["copy", "other_device"])
def test_exporter_never_copies(request_):
    with pytest.raises(BufferError, match="never copied"):
        Exporter(pattern(BF16), BF16).__dlpack__(**request_)


def test_exporter_is_read_by_numpy_itself():
    a = pattern(np.float32)
    taken = np.from_dlpack(Exporter(a, a.dtype))
    assert taken.ctypes.data == a.ctypes.data
    assert np.array_equal(taken, a)


def test_exporter_may_rename_the_dtype():
    """UE8M0 scales travel as bytes and are handed out as float8_e8m0fnu."""
    scales = pattern(np.uint8)
    tensor = read(Exporter(scales, np.dtype(ml_dtypes.float8_e8m0fnu)), "scales")
    assert (tensor.dtype, tensor.ptr) == (np.dtype(ml_dtypes.float8_e8m0fnu), scales.ctypes.data)


@ALL_DTYPES
def test_ndarray_over(dtype):
    a = pattern(dtype)
    owner = Owner(a)
    source = weakref.ref(owner)
    rows = ndarray_over(a.ctypes.data, (4, 6), dtype, owner=owner)
    columns = ndarray_over(a.ctypes.data, (6, 4), dtype, owner=owner, strides=(1, 6), readonly=True)
    del owner
    assert (rows.dtype, rows.ctypes.data, rows.tobytes()) == (dtype, a.ctypes.data, a.tobytes())
    assert columns.tobytes() == a.T.tobytes()
    assert rows.flags.writeable
    assert not columns.flags.writeable
    del rows
    assert source() is not None
    del columns
    assert source() is None


def test_device_address_is_never_touched():
    """Address 64 belongs to nobody: reading it anywhere on the way would end the process."""
    a = ndarray_over(64, (4, 6), BF16, owner=None)
    view = import_array(Exporter(a, BF16, (CUDA, 1)), "x")
    assert (view.ptr, view.shape, view.dtype, view.device) == (64, (4, 6), BF16, (CUDA, 1))


def test_prototypes_do_not_leak_into_ctypes():
    assert ctypes.pythonapi.PyCapsule_GetPointer.argtypes is None


# ---- require


def spec_of(**changes):
    fields = {"framework": "numpy", "shape": (4, 6), "strides": (6, 1), "dtype": BF16, "device": (CPU, 0)}
    return array_spec(**{**fields, **changes})


def test_arrays_that_look_the_same_have_one_spec():
    """Whatever is known of a spec is found by identity."""
    first, second = np.zeros((5, 48), np.float32), np.zeros((5, 48), np.float32)
    spec = import_array(first, "x").spec
    assert import_array(second, "y").spec is spec
    assert import_array(first[:, :3], "x").spec is not spec
    assert import_array(first.view(np.int32), "x").spec is not spec
    assert import_array(first[1:], "x").spec is not spec
    frozen = second.view()
    frozen.flags.writeable = False
    assert import_array(frozen, "x").spec is not spec
    moved = np.zeros((5 * 48 + 1,), np.float32)[1:].reshape(5, 48)
    assert import_array(moved, "x").spec is not spec
    assert import_array(moved, "x").spec.misalignment == moved.ctypes.data % 16


@pytest.mark.parametrize(
    ("shape", "strides", "contiguous"),
    [
        ((4, 6), None, True),
        ((4, 6), (6, 1), True),
        ((4, 6), (1, 4), False),
        ((4, 6), (7, 1), False),
        ((4, 6), (0, 1), False),
        ((1, 6), (99, 1), True),
        ((4, 1), (1, 99), True),
        ((2, 0, 3), (9, 9, 9), True),
        ((), (), True),
    ],
)
def test_contiguous(shape, strides, contiguous):
    spec = spec_of(shape=shape, strides=strides)
    assert spec.contiguous == contiguous
    assert spec.num_bytes == 2 * int(np.prod(shape))
    assert strides is None or spec.strides == strides


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (spec_of(), {}),
        (spec_of(), {"dtypes": (BF16, np.dtype(np.float32)), "ndim": 2, "shape": (4, 6), "aligned": True}),
        (spec_of(), {"dtypes": [ml_dtypes.bfloat16], "shape": (None, 6)}),
        (spec_of(misalignment=2), {}),
        (spec_of(strides=(1, 4)), {"contiguous": False}),
        (spec_of(shape=(0, 6), strides=(9, 9), misalignment=3), {"aligned": True}),
        (spec_of(shape=(1, 6), strides=(77, 1)), {}),
        (spec_of(shape=(), strides=()), {"ndim": 0, "shape": ()}),
        (spec_of(device=(dlpack.CUDA_HOST, 0)), {"place": "cpu"}),
        (spec_of(device=(CUDA, 1)), {"place": 1}),
        (spec_of(device=(CUDA, 1)), {"place": None}),
    ],
    ids=[
        "defaults",
        "all_conditions",
        "scalar_type_as_dtype",
        "unaligned",
        "column_major",
        "no_rows",
        "one_row_any_stride",
        "no_axes",
        "pinned_memory",
        "cuda",
        "any_device",
    ],
)
def test_require_accepts(spec, wanted):
    require(spec, "x", **wanted)


@pytest.mark.parametrize(
    ("spec", "wanted", "error", "message"),
    [
        (spec_of(), {"dtypes": (np.dtype(np.int32), np.dtype(np.int64))}, DtypeError, "dtype bfloat16.*int32 or int64"),
        (spec_of(), {"ndim": 1}, ShapeError, r"shape \[4, 6\]; wanted 1 dimension;"),
        (spec_of(), {"ndim": 3}, ShapeError, "wanted 3 dimensions;"),
        (spec_of(), {"shape": (4, 7)}, ShapeError, r"got shape \[4, 6\]; wanted \[4, 7\]"),
        (spec_of(), {"shape": (None, None, 6)}, ShapeError, r"wanted \[any, any, 6\]"),
        (spec_of(strides=(1, 4)), {}, LayoutError, r"strides \[1, 4\] for shape \[4, 6\].*contiguous copy"),
        (spec_of(strides=(12, 1)), {}, LayoutError, "without gaps"),
        (spec_of(strides=(-6, 1)), {}, LayoutError, "without gaps"),
        (spec_of(strides=(6, 0)), {}, LayoutError, "without gaps"),
        (spec_of(misalignment=8), {"aligned": True}, LayoutError, "8 bytes past a multiple of 16"),
        (spec_of(device=(CUDA, 1)), {}, DeviceError, "cuda:1.*host backend takes CPU arrays; pass backend='cuda'"),
        (spec_of(device=(8, 0)), {}, DeviceError, r"got DLPack device \(8, 0\); wanted an array on cpu"),
        (spec_of(), {"place": 0}, DeviceError, "got a CPU array; wanted an array on cuda.*pass backend='host'"),
        (spec_of(device=(CUDA, 0), dtype=np.dtype("f4")), {"dtypes": (BF16,)}, DeviceError, "cuda:0"),
        (spec_of(device=(CUDA, 1)), {"place": 0}, DeviceError, "on cuda:1; wanted one on cuda:0, the device of this B"),
        (spec_of(device=(CUDA, 1)), {"place": 0, "ndim": 1}, ShapeError, "wanted 1 dimension;"),
    ],
    ids=[
        "dtype",
        "too_many_axes",
        "too_few_axes",
        "extent",
        "axes_of_shape",
        "column_major",
        "gaps",
        "reversed",
        "broadcast",
        "unaligned",
        "cuda_on_host",
        "metal_on_host",
        "cpu_on_cuda",
        "device_is_checked_first",
        "another_gpu",
        "another_gpu_is_checked_last",
    ],
)
def test_require_raises(spec, wanted, error, message):
    with pytest.raises(error, match=message) as caught:
        require(spec, "x", **wanted)
    assert type(caught.value) is error
    assert str(caught.value).startswith("x: got ")


# ---- empty


@ALL_DTYPES
@pytest.mark.parametrize("shape", [(), 5, (0, 6), (3, 5), (1000, 7)], ids=str)
def test_empty(dtype, shape):
    a = empty(shape, dtype)
    assert (a.dtype, a.shape) == (dtype, (shape,) if isinstance(shape, int) else shape)
    assert a.ctypes.data % 64 == 0
    assert a.flags.c_contiguous
    assert a.flags.writeable


@ALL_DTYPES
@pytest.mark.parametrize("value", [0, 1])
def test_empty_filled(dtype, value):
    a = empty((3, 5), dtype, fill=value)
    assert a.tobytes() == np.full((3, 5), value, dtype).tobytes()


@pytest.mark.parametrize("value", [np.nan, -0.0, -1.5])
def test_empty_filled_with_signs_and_nan(value):
    a = empty(9, BF16, fill=value)
    assert a.tobytes() == np.full(9, value, BF16).tobytes()


# ---- the process


def run_python(code):
    """Run `code` in a fresh interpreter; what it says on stderr, and its exit status, are the result."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_views_that_outlive_the_interpreter():
    run_python("""
import builtins, gc, sys, types
import ml_dtypes, numpy as np
from epcomm.arrays import empty, import_array
from epcomm.dlpack import Exporter

gc.disable()  # the cycle is still there when the interpreter ends

def views():
    a = empty((4, 6), ml_dtypes.bfloat16, fill=1)
    view = import_array(Exporter(a, a.dtype), "x")
    return [a, view, view.numpy(), Exporter(a, a.dtype).__dlpack__()]

cycle = views()
cycle.append(cycle)
del cycle
keeper = sys.modules["keeper"] = types.ModuleType("keeper")
keeper.kept = views()
sys.kept = views()
builtins.kept = views()
kept = views()
""")


def test_no_framework_is_imported():
    loaded = run_python("""
import sys
import numpy as np
from epcomm.arrays import export_array, import_array
export_array(import_array(np.zeros(3), "x").numpy(), "numpy")
print([name for name in ("torch", "jax", "cupy") if name in sys.modules])
""")
    assert loaded.strip() == "[]"
