"""Where the arrays of the demo lie: in host memory for the host backend, on the GPU for CUDA."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.cli import bits
from epcomm.cli.demo.model import BFLOAT16, Expert
from epcomm.handle import DispatchResult

__all__ = ["Arrays", "CupyArrays", "Received", "arrays_of"]

# One element of a product: i is its index in the row-major result.
_DOT = """
    const long long row = i / width, column = i % width;
    T sum = 0;
    for (int k = 0; k < depth; ++k) sum += a[row * depth + k] * b[(long long)k * width + column];
    c = sum;
"""


@dataclass(frozen=True, eq=False)
class Received:
    """What a dispatch delivered, in host memory; N rows.

    Attributes:
        rows: bfloat16 ``[N, H]``.
        topk_idx, topk_weights: ``[N, K]``.
        sources: int32 ``[N]``, token indices at the source.
        per_expert: int64 ``[L]``.
        rows_from: int64 ``[R]``, rows by source rank.
    """

    rows: NDArray[Any]
    topk_idx: NDArray[np.int64]
    topk_weights: NDArray[np.float32]
    sources: NDArray[np.int32]
    per_expert: NDArray[np.int64]
    rows_from: NDArray[np.int64]


class Arrays:
    """NumPy arrays; on the host nothing has to be brought anywhere."""

    xp: Any = np

    @property
    def machine(self) -> str:
        """What computes."""
        cores = os.cpu_count() or 1
        return f"NumPy on the CPU, {cores} core{'' if cores == 1 else 's'}, no GPU"

    def put(self, array: NDArray[Any]) -> Any:
        """An array of host memory where the Buffer wants it."""
        return array

    def get(self, array: Any) -> NDArray[Any]:
        """An array of the Buffer in host memory."""
        host: NDArray[Any] = array
        return host

    def put_expert(self, expert: Expert) -> Expert:
        """The same, with weights where rows are."""
        return expert

    def matmul(self, a: Any, b: Any) -> Any:
        """``a @ b`` of float32 matrices."""
        return np.matmul(a, b)

    def finish(self) -> None:
        """Wait for all that was started."""

    def widen(self, rows: Any) -> Any:
        """bfloat16 as float32."""
        return bits.widen(self.xp, bits.as_bits(rows), BFLOAT16)

    def narrow(self, values: Any) -> Any:
        """float32 rounded to bfloat16."""
        return bits.as_rows(bits.round_to(self.xp, values, BFLOAT16), BFLOAT16)

    def received(self, dispatched: DispatchResult) -> Received:
        """What came, in host memory."""
        handle = dispatched.handle
        return Received(
            rows=self.get(dispatched.recv_x),
            topk_idx=self.get(dispatched.recv_topk_idx),
            topk_weights=self.get(dispatched.recv_topk_weights),
            sources=self._sources(handle),
            per_expert=np.array(dispatched.num_recv_tokens_per_expert_list, np.int64),
            rows_from=np.diff(handle.recv_rank_prefix_sum, prepend=0).astype(np.int64),
        )

    def _sources(self, handle: Any) -> NDArray[np.int32]:
        return np.asarray(handle.recv_src_idx)


class CupyArrays(Arrays):
    """CuPy arrays on the current device; the gate and what is compared stay in host memory."""

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        # CuPy's own needs cuBLAS, a large package that nothing else here needs.
        self._dot = cupy.ElementwiseKernel("raw T a, raw T b, int32 depth, int32 width", "T c", _DOT, "epcomm_demo_dot")

    @property
    def machine(self) -> str:
        runtime = self.xp.cuda.runtime
        return f"CuPy on {runtime.getDeviceProperties(self.xp.cuda.Device().id)['name'].decode()}"

    def put(self, array: NDArray[Any]) -> Any:
        return bits.as_rows(self.xp.asarray(bits.as_bits(array)), array.dtype)

    def get(self, array: Any) -> NDArray[Any]:
        return bits.as_rows(self.xp.asnumpy(bits.as_bits(array)), array.dtype)  # type: ignore[no-any-return]

    def put_expert(self, expert: Expert) -> Expert:
        return Expert(self.put(expert.gate), self.put(expert.up), self.put(expert.down))

    def matmul(self, a: Any, b: Any) -> Any:
        product = self.xp.empty((a.shape[0], b.shape[1]), a.dtype)
        return self._dot(a, b, a.shape[1], b.shape[1], product)

    def finish(self) -> None:
        self.xp.cuda.get_current_stream().synchronize()

    def _sources(self, handle: Any) -> NDArray[np.int32]:
        return self.get(handle[3])  # the field itself is no array of CuPy


def arrays_of(backend: str) -> Arrays:
    """The arrays that a Buffer with this backend takes."""
    return CupyArrays() if backend == "cuda" else Arrays()
