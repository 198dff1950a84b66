"""JAX arrays in and out, without a copy where JAX allows it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from epcomm.arrays import empty, export_array, framework_of, import_array
from epcomm.dlpack import CPU, ndarray_over
from epcomm.errors import DtypeError, ImmutableArray, InputError

jax = pytest.importorskip("jax")
jnp = jax.numpy

ROOT = Path(__file__).parents[2]
WIDE = [np.dtype(dtype) for dtype in (np.int64, np.uint64, np.float64)]
DTYPES = [
    np.dtype(dtype)
    for dtype in (
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e8m0fnu,
        np.uint8,
        np.int8,
        np.int16,
        np.int32,
        np.bool_,
    )
]


@pytest.fixture(autouse=True)
def on_cpu():
    """Host arrays, also on a machine whose JAX prefers a GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def pattern(dtype, shape=(4, 6)):
    """An aligned array whose bytes depend on their position only; booleans are 0 or 1."""
    a = empty(shape, dtype)
    octets = a.reshape(-1).view(np.uint8)
    octets[:] = np.arange(octets.size) % (2 if a.dtype == bool else 251)
    return a


@pytest.mark.parametrize("dtype", DTYPES + WIDE, ids=str)
@pytest.mark.parametrize("layout", ["row_major", "zero_size", "column_major", "scalar"])
def test_round_trip(dtype, layout):
    a = {
        "row_major": lambda: pattern(dtype),
        "zero_size": lambda: pattern(dtype, (0, 6)),
        "column_major": lambda: pattern(dtype).T,
        "scalar": lambda: pattern(dtype, ()),
    }[layout]()
    with jax.enable_x64(True):
        x = export_array(a, "jax")
        view = import_array(x, "x")
        assert np.asarray(x).tobytes() == a.tobytes()
    assert isinstance(x, jax.Array)
    assert (x.dtype, x.shape) == (dtype, a.shape)
    assert a.size == 0 or x.unsafe_buffer_pointer() == a.ctypes.data

    assert (view.framework, view.shape, view.dtype, view.device) == ("jax", a.shape, dtype, (CPU, 0))
    assert view.readonly
    back = view.numpy()
    assert (back.dtype, back.shape, back.tobytes()) == (dtype, a.shape, a.tobytes())
    assert not back.flags.writeable
    assert a.size == 0 or back.ctypes.data == view.ptr == a.ctypes.data
    assert a.size == 0 or back.strides == a.strides


def test_scales_allocated_transposed():
    """DeepEP's fp32 scales: allocated [experts, scales, rows], handed out as [experts, rows, scales]."""
    scales = empty((2, 3, 8), np.float32)
    scales[:] = np.arange(48).reshape(2, 3, 8)
    x = export_array(scales.transpose(0, 2, 1), "jax")
    assert (x.shape, x.unsafe_buffer_pointer()) == ((2, 8, 3), scales.ctypes.data)
    assert x[1, 7, 2] == 47
    assert import_array(x, "x").strides == (24, 1, 8)


@pytest.mark.parametrize("layout", ["gaps", "reversed", "broadcast", "unaligned"])
def test_layouts_that_jax_cannot_share_are_copied(layout):
    block = pattern(np.float32)
    a = {
        "gaps": lambda: block[:, :3],
        "reversed": lambda: block[::-1],
        "broadcast": lambda: np.lib.stride_tricks.as_strided(block, (4, 6), (0, 4)),
        "unaligned": lambda: block.reshape(-1)[1:],
    }[layout]()
    x = export_array(a, "jax")
    expected = a.copy()
    assert x.shape == a.shape
    block.fill(0)
    assert np.asarray(x).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("dtype", "narrow"), list(zip(WIDE, ("int32", "uint32", "float32"), strict=True)), ids=str)
@pytest.mark.parametrize("layout", ["row_major", "column_major", "gaps"])
def test_without_x64_wide_dtypes_become_narrow_copies(dtype, narrow, layout):
    block = empty((4, 6), dtype)
    block[:] = np.arange(24).reshape(4, 6)
    a = {"row_major": block, "column_major": block.T, "gaps": block[:, :3]}[layout]
    with jax.enable_x64(False):
        x = export_array(a, "jax")
    assert x.dtype == narrow
    expected = a.astype(narrow)
    block.fill(0)
    assert np.array_equal(np.asarray(x), expected)


def test_arrays_that_jax_made():
    values = np.arange(24).reshape(4, 6)
    x = jnp.asarray(values, jnp.bfloat16)
    view = import_array(x, "x")
    assert framework_of(x) == "jax"
    assert (view.ptr, view.strides, view.dtype) == (x.unsafe_buffer_pointer(), (6, 1), ml_dtypes.bfloat16)
    assert np.array_equal(view.numpy().astype(int), values)
    assert import_array(jnp.zeros((0, 7)), "x").numpy().shape == (0, 7)


def test_values_that_are_still_being_computed_are_waited_for():
    product = jax.jit(lambda m: m @ m @ m @ m)(jnp.full((512, 512), 1 / 512, jnp.float32))
    assert import_array(product, "x").numpy() == pytest.approx(1 / 512)


class Owner:
    def __init__(self, memory):
        self.memory = memory


def test_source_is_freed_with_the_last_view():
    owner = Owner(pattern(np.float32))
    expected = owner.memory[1:].copy()
    source = weakref.ref(owner)
    a = ndarray_over(owner.memory.ctypes.data, (4, 6), np.dtype(np.float32), owner=owner)
    x = export_array(a, "jax")
    del a, owner
    gc.collect()
    assert source() is not None
    part = import_array(x, "x").numpy()[1:]
    del x
    gc.collect()
    assert source() is not None
    assert np.array_equal(part, expected)
    del part
    gc.collect()
    assert source() is None


def test_view_survives_delete():
    x = jnp.arange(4.0)
    view = import_array(x, "x")
    x.delete()
    assert view.numpy().tolist() == [0, 1, 2, 3]


# ---- what is refused


def test_jax_arrays_are_never_written():
    with pytest.raises(ImmutableArray, match=r"out: got a JAX array.*leave this argument out and use the array that"):
        import_array(jnp.ones(3), "out", writable=True)


TRANSFORMS = {
    "jit": lambda f: jax.jit(f)(jnp.ones((2, 3))),
    "vmap": lambda f: jax.vmap(f)(jnp.ones((2, 3))),
    "grad": lambda f: jax.grad(lambda x: f(x).sum())(jnp.ones(3)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_tracers_are_refused(transform):
    def body(x):
        import_array(x, "x")
        return x

    with pytest.raises(
        InputError, match=r"x: got a JAX tracer .*call epcomm outside jax\.jit, jax\.vmap and jax\.grad"
    ):
        TRANSFORMS[transform](body)


def test_deleted_array_is_refused():
    x = jnp.ones(3)
    x.delete()
    with pytest.raises(InputError, match="x: got a JAX array that was deleted or donated"):
        import_array(x, "x")


def test_donated_array_is_refused():
    x = jnp.ones(3)
    jax.jit(lambda v: v + 1, donate_argnums=0)(x)
    with pytest.raises(InputError, match="deleted or donated"):
        import_array(x, "x")


def test_random_keys_are_refused():
    with pytest.raises(DtypeError, match=r"a JAX array of key.*pass jax\.random\.key_data\(x\)"):
        import_array(jax.random.key(0), "x")


@pytest.mark.parametrize("dtype", ["int4", "complex64", "float8_e4m3fnuz"])
def test_dtypes_that_are_refused(dtype):
    with pytest.raises(DtypeError, match=f"x: got dtype {dtype}; wanted one of"):
        import_array(jnp.zeros(4, dtype), "x")


@pytest.mark.parametrize("thing", [jax.ShapeDtypeStruct((2,), "float32"), jax.Array], ids=["shape", "class"])
def test_things_of_jax_that_are_no_arrays(thing):
    with pytest.raises(DtypeError, match="x: got a "):
        import_array(thing, "x")


def test_read_only_array_is_not_handed_out():
    a = empty(3, np.float32)
    a.flags.writeable = False
    with pytest.raises(InputError, match="read-only"):
        export_array(a, "jax")


# ---- the process


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_array_on_several_devices_is_refused():
    said = run_python(
        """
import jax, jax.numpy as jnp
from epcomm.arrays import import_array
from epcomm.errors import InputError

mesh = jax.make_mesh((2,), ("i",))
x = jax.device_put(jnp.arange(8.0), jax.NamedSharding(mesh, jax.P("i")))
for case in (x, jax.device_put(x, jax.NamedSharding(mesh, jax.P()))):
    try:
        import_array(case, "x")
    except InputError as error:
        print(error)
print(import_array(x.addressable_shards[1].data, "x").numpy().tolist())
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    *refusals, part = said.splitlines()
    assert len(refusals) == 2
    for refusal in refusals:
        assert refusal.startswith("x: got a JAX array on 2 devices; wanted an array on one device")
    assert part == "[4.0, 5.0, 6.0, 7.0]"


def test_arrays_that_outlive_the_interpreter():
    run_python("""
import builtins, gc, sys, types
import jax, jax.numpy as jnp, ml_dtypes
from epcomm.arrays import empty, export_array, import_array

gc.disable()  # the cycle is still there when the interpreter ends

def outputs():
    x = export_array(empty((4, 6), ml_dtypes.bfloat16, fill=1), "jax")
    view = import_array(x, "x")
    return [x, view, view.numpy(), import_array(jnp.ones(3), "x").numpy()]

cycle = outputs()
cycle.append(cycle)
del cycle
keeper = sys.modules["keeper"] = types.ModuleType("keeper")
keeper.kept = outputs()
jax.kept = outputs()
sys.kept = outputs()
builtins.kept = outputs()
kept = outputs()
""")
