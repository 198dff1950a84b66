"""PyTorch tensors in and out, without a copy."""

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
from epcomm.errors import DeviceError, DtypeError, InputError

torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
DTYPES = [
    np.dtype(dtype)
    for dtype in (
        np.float64,
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
        np.int64,
        np.bool_,
    )
]


def pattern(dtype, shape=(4, 6)):
    """An aligned array whose bytes depend on their position only; booleans are 0 or 1."""
    a = empty(shape, dtype)
    octets = a.reshape(-1).view(np.uint8)
    octets[:] = np.arange(octets.size) % (2 if a.dtype == bool else 251)
    return a


def octets_of(t):
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["row_major", "zero_size", "column_major", "scalar", "gaps"])
def test_round_trip(dtype, layout):
    a = {
        "row_major": lambda: pattern(dtype),
        "zero_size": lambda: pattern(dtype, (0, 6)),
        "column_major": lambda: pattern(dtype).T,
        "scalar": lambda: pattern(dtype, ()),
        "gaps": lambda: pattern(dtype)[:, :3],
    }[layout]()
    t = export_array(a, "torch")
    assert str(t.dtype) == f"torch.{dtype.name}"
    assert (tuple(t.shape), t.device.type, t.requires_grad) == (a.shape, "cpu", False)
    assert octets_of(t) == a.tobytes()
    assert a.size == 0 or t.data_ptr() == a.ctypes.data
    assert a.size == 0 or t.stride() == tuple(step // dtype.itemsize for step in a.strides)

    view = import_array(t, "x")
    assert (view.framework, view.ptr, view.shape, view.dtype) == ("torch", t.data_ptr(), a.shape, dtype)
    assert (view.strides, view.device, view.readonly) == (t.stride(), (CPU, 0), False)
    assert view.contiguous == t.is_contiguous()
    back = view.numpy()
    assert (back.dtype, back.shape, back.tobytes()) == (dtype, a.shape, a.tobytes())
    assert a.size == 0 or back.ctypes.data == a.ctypes.data


def test_scales_allocated_transposed():
    """DeepEP's fp32 scales: allocated [experts, scales, rows], handed out as [experts, rows, scales]."""
    scales = empty((2, 3, 8), np.float32)
    scales[:] = np.arange(48).reshape(2, 3, 8)
    t = export_array(scales.transpose(0, 2, 1), "torch")
    assert (t.shape, t.stride(), t.data_ptr()) == ((2, 8, 3), (24, 1, 8), scales.ctypes.data)
    assert t[1, 7, 2] == 47
    assert import_array(t, "x").strides == (24, 1, 8)


def test_empty_tensor_that_torch_made_without_memory():
    t = torch.empty(0, 7, dtype=torch.bfloat16)
    view = import_array(t, "x")
    assert (view.ptr, view.shape, view.contiguous) == (0, (0, 7), True)
    host = view.numpy()
    assert (host.shape, host.dtype) == ((0, 7), ml_dtypes.bfloat16)


def test_both_directions_share_one_memory():
    a = empty(3, ml_dtypes.bfloat16, fill=0)
    t = export_array(a, "torch")
    t[1] = 2
    import_array(t, "out", writable=True).numpy()[2] = 3
    assert a.astype(float).tolist() == t.float().tolist() == [0, 2, 3]


class Owner:
    def __init__(self, memory):
        self.memory = memory


def test_source_is_freed_with_the_last_view():
    owner = Owner(pattern(np.float32))
    expected = owner.memory[1:].copy()
    source = weakref.ref(owner)
    a = ndarray_over(owner.memory.ctypes.data, (4, 6), np.dtype(np.float32), owner=owner)
    t = export_array(a, "torch")
    del a, owner
    gc.collect()
    assert source() is not None
    part = import_array(t, "x").numpy()[1:]
    del t
    gc.collect()
    assert source() is not None
    assert np.array_equal(part, expected)
    del part
    gc.collect()
    assert source() is None


def test_view_survives_an_exchange_of_the_tensors_memory():
    t = torch.arange(4.0)
    view = import_array(t, "x")
    t.data = torch.zeros(9)
    gc.collect()
    assert view.numpy().tolist() == [0, 1, 2, 3]


# ---- autograd


def test_tensor_that_requires_grad_is_taken_detached():
    t = torch.ones(4, requires_grad=True)
    assert import_array(t, "x").ptr == t.data_ptr()
    computed = t * 3
    assert import_array(computed, "x").numpy().tolist() == [3, 3, 3, 3]


def test_parameter_is_taken():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    assert framework_of(weight) == "torch"
    assert import_array(weight, "x").ptr == weight.data_ptr()


def test_inside_an_autograd_function():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return export_array(import_array(x, "x").numpy() * 2, "torch")

        @staticmethod
        def backward(ctx, grad):
            return export_array(import_array(grad, "grad").numpy() * 2, "torch")

    x = torch.arange(3.0, requires_grad=True)
    y = Double.apply(x)
    y.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert y.tolist() == [0, 2, 4]
    assert x.grad.tolist() == [2, 4, 6]


def test_writing_what_autograd_records_is_refused():
    t = torch.ones(4, requires_grad=True)
    with pytest.raises(InputError, match=r"out: got a tensor that requires grad.*x\.detach\(\)"):
        import_array(t, "out", writable=True)
    with torch.no_grad():
        assert import_array(t, "out", writable=True).ptr == t.data_ptr()
    assert import_array(t.detach(), "out", writable=True).ptr == t.data_ptr()


def test_writing_what_autograd_saved_makes_backward_raise():
    weight, saved = torch.ones(3, requires_grad=True), torch.ones(3)
    product = (weight * saved).sum()
    import_array(saved, "x")
    import_array(saved, "out", writable=True).numpy()[:] = 5
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensor_may_be_written():
    with torch.inference_mode():
        t = torch.zeros(2)
        import_array(t, "out", writable=True).numpy()[:] = 1
    assert t.tolist() == [1, 1]


# ---- what is refused


def make_fake():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        return torch.ones(3)


class Subclass(torch.Tensor):
    pass


REFUSED = {
    "fake": (make_fake, "FakeTensor.*outside torch.compile"),
    "subclass": (lambda: torch.ones(3).as_subclass(Subclass), r"Subclass; .*x\.as_subclass\(torch\.Tensor\)"),
    "sparse": (lambda: torch.ones(3).to_sparse(), r"layout torch.sparse_coo.*to_dense\(\)"),
    "mkldnn": (lambda: torch.ones(3).to_mkldnn(), r"layout torch._mkldnn.*to_dense\(\)"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8), "a quantized tensor"),
    "nested_strided": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    "nested_jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        r"NestedTensor.*x\.values\(\)",
    ),
    "conjugated": (lambda: torch.ones(3, dtype=torch.complex64).conj(), "lazily conjugated.*resolve_conj"),
    "negated": (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "negated view.*resolve_neg"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_are_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(InputError, match=f"^x: got .*{message}"):
        import_array(make(), "x")


TRANSFORMS = {
    "vmap": lambda f: torch.vmap(f)(torch.ones(2, 3)),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(torch.ones(3)),
    "jvp": lambda f: torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),)),
    "functionalize": lambda f: torch.func.functionalize(f)(torch.ones(3)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_inside_a_transform(transform):
    def body(x):
        import_array(x, "x")
        return x

    with pytest.raises(InputError, match=r"wrapped by a torch\.func transform.*outside the transform"):
        TRANSFORMS[transform](body)


def test_meta_tensor_is_on_no_device():
    with pytest.raises(DeviceError, match="x: got a tensor on meta; wanted cpu or cuda"):
        import_array(torch.ones(3, device="meta"), "x")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_dtypes_that_are_refused(dtype):
    with pytest.raises(DtypeError, match=f"x: got dtype {dtype}"):
        import_array(torch.ones(3, dtype=dtype), "x")


def test_read_only_array_is_not_handed_out():
    a = empty(3, np.float32)
    a.flags.writeable = False
    with pytest.raises(InputError, match="read-only"):
        export_array(a, "torch")


@pytest.mark.parametrize("dtype", [">f4", "c8"])
def test_export_of_other_dtypes_is_refused(dtype):
    with pytest.raises(DtypeError, match="export_array"):
        export_array(np.zeros(3, dtype), "torch")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False")
def test_cuda_tensor_is_taken_by_address():
    t = torch.ones(2, 3, dtype=torch.bfloat16, device="cuda")
    view = import_array(t, "x")
    assert (view.ptr, view.device, view.on_cpu) == (t.data_ptr(), (2, t.device.index), False)
    with pytest.raises(DeviceError, match="backend='cuda'"):
        view.numpy()


def test_tensors_that_outlive_the_interpreter():
    code = """
import builtins, gc, sys, types
import ml_dtypes, torch
from epcomm.arrays import empty, export_array, import_array

gc.disable()  # the cycle is still there when the interpreter ends

def outputs():
    t = export_array(empty((4, 6), ml_dtypes.bfloat16, fill=1), "torch")
    view = import_array(t, "x")
    return [t, view, view.numpy(), t[1:], import_array(torch.ones(3), "x").numpy()]

cycle = outputs()
cycle.append(cycle)
del cycle
keeper = sys.modules["keeper"] = types.ModuleType("keeper")
keeper.kept = outputs()
torch.kept = outputs()
sys.kept = outputs()
builtins.kept = outputs()
kept = outputs()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
