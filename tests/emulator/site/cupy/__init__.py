"""Stand-in for CuPy on a GPU that is emulated: what epcomm, its tests and its examples use, and nothing else.

An attribute that is not here is an AttributeError, and what CuPy cannot do, this cannot either.
"""

from __future__ import annotations

from typing import Any

import numpy as _numpy

from cupy import cuda
from cupy.arrays import (
    arange,
    asarray,
    asnumpy,
    copyto,
    empty,
    from_dlpack,
    full,
    ndarray,
    ones,
    zeros,
)
from cupy.cuda.memory import default_pool as _default_pool
from cupy.kernels import ElementwiseKernel, RawKernel, RawModule
from cupy.operations import allclose, flatnonzero, isnan, matmul, multiply, nonzero, where

__version__ = "14.2.0"

# By this the tests know that time and the hardware's own limits mean nothing here.
is_emulated = True

bool_ = _numpy.bool_
float16, float32, float64 = _numpy.float16, _numpy.float32, _numpy.float64
int8, int16, int32, int64 = _numpy.int8, _numpy.int16, _numpy.int32, _numpy.int64
uint8, uint16, uint32, uint64 = _numpy.uint8, _numpy.uint16, _numpy.uint32, _numpy.uint64


def get_default_memory_pool() -> Any:
    return _default_pool


__all__ = [
    "ElementwiseKernel",
    "RawKernel",
    "RawModule",
    "allclose",
    "arange",
    "asarray",
    "asnumpy",
    "copyto",
    "cuda",
    "empty",
    "flatnonzero",
    "from_dlpack",
    "full",
    "get_default_memory_pool",
    "isnan",
    "matmul",
    "multiply",
    "ndarray",
    "nonzero",
    "ones",
    "where",
    "zeros",
]
