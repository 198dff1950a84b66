"""Where the fields of received metadata lie, computed by Python and by a kernel."""

from __future__ import annotations

import random

import numpy as np
from helpers.gpu import need_gpu
from helpers.nvrtc import compile_cubin

from epcomm.jit.device import device_architecture
from epcomm.jit.kernel import Kernel
from epcomm.kernels.layout import MetadataLayout, scales_offset

cupy = need_gpu()

SOURCE = r"""
#include "common/layout.cuh"
using namespace epcomm;
struct Arguments { uint64_t cases, out; };
extern "C" __global__ void probe(const __grid_constant__ Arguments args) {
    const int64_t* of = pointer<const int64_t>(args.cases) + 5 * threadIdx.x;
    uint64_t* to = pointer<uint64_t>(args.out) + 4 * threadIdx.x;
    const MetadataLayout layout(of[0], of[1], of[2], of[3] != 0);
    to[0] = layout.topk_idx, to[1] = layout.topk_weights, to[2] = layout.num_bytes;
    to[3] = scales_offset(of[0], of[4]);
}
"""


def test_offsets():
    draw = random.Random(3)
    rows = (0, 1, 7, 300, 40000, 1 << 24)
    cases = [
        (draw.choice(rows), draw.randint(0, 32), draw.choice((4, 8)), draw.randint(0, 1), 16 * number)
        for number in range(1, 257)
    ]
    given, out = cupy.asarray(np.array(cases, np.int64)), cupy.zeros((len(cases), 4), np.uint64)
    probe = Kernel(compile_cubin(SOURCE, device_architecture(0)), "probe", 0)
    arguments = np.array([given.data.ptr, out.data.ptr], np.uint64)
    probe.launch(1, len(cases), 0, cupy.cuda.get_current_stream().ptr, arguments.ctypes.data)
    for case, got in zip(cases, out.get().tolist(), strict=True):
        num_rows, num_topk, index_bytes, has_weights, row_bytes = case
        layout = MetadataLayout(num_rows, num_topk, index_bytes, bool(has_weights))
        assert got == [layout.topk_idx, layout.topk_weights, layout.num_bytes, scales_offset(num_rows, row_bytes)], case
