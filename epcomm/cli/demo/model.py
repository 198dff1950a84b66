"""The layer of the demo, as every rank can compute it: embedding, gate, experts, and all of it densely.

Weights are functions of the seed and of the expert's number, embeddings of the seed and of the token's place in the
text. So a rank makes the experts it owns and no others, and any rank can recompute any row that it received.

The gate is that of DeepSeek-V3 (Technical Report, arXiv:2412.19437, equations 12 to 15 and "node-limited routing" in
section 2.1.2; the scores of groups and the scale as in class ``Gate`` of the released ``inference/model.py``)::

    s[e] = sigmoid(u . centroid[e])             affinity of a token u to expert e
    group score = sum of its two best s         the best groups are kept, the others get no token
    chosen = the top-k of s inside them
    weight[e] = scale * s[e] / sum over chosen s

The bias that training adds to s for balance, when it chooses, is zero here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from epcomm.testing import create_grouped_scores

__all__ = ["BFLOAT16", "Expert", "LayerConfig", "MoeLayer", "fit_groups"]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_ROUTE_SCALE = 2.5
_MAX_GROUPS = 8
_POSITION_SCALE = 0.5  # against embeddings of variance 1: the byte decides most, its place makes tokens differ

# First word of the seed of each kind of weight.
_EMBEDDING, _CENTROIDS, _EXPERT = range(3)


def fit_groups(num_experts: int, num_topk: int) -> tuple[int, int]:
    """(groups, groups kept) like DeepSeek-V3's 8 and 4, as far as the numbers allow.

    At most 8 groups of two experts or more; half of them kept, or as many as it takes to hold `num_topk` experts.
    """
    sizes = range(min(_MAX_GROUPS, num_experts // 2), 1, -1)
    num_groups = next((groups for groups in sizes if num_experts % groups == 0), 1)
    needed = -(-num_topk * num_groups // num_experts)
    return num_groups, max(-(-num_groups // 2), needed)


@dataclass(frozen=True)
class LayerConfig:
    """Sizes of the layer, and the seed of its weights."""

    num_experts: int
    num_topk: int
    hidden: int
    seed: int

    @property
    def intermediate(self) -> int:
        """Width of an expert's middle."""
        return max(8, self.hidden // 4)

    @property
    def groups(self) -> tuple[int, int]:
        """(groups, groups kept)."""
        return fit_groups(self.num_experts, self.num_topk)

    def rng(self, *key: int) -> np.random.Generator:
        """The generator of one piece of the weights."""
        return np.random.default_rng([self.seed, *key])


@dataclass(frozen=True, eq=False)
class Expert:
    """A SwiGLU feed-forward network: ``(silu(x gate) * (x up)) down``, in float32."""

    gate: NDArray[np.float32]  # [H, F]
    up: NDArray[np.float32]  # [H, F]
    down: NDArray[np.float32]  # [F, H]

    @classmethod
    def make(cls, config: LayerConfig, index: int) -> Expert:
        """Expert `index` of all."""
        rng, hidden, width = config.rng(_EXPERT, index), config.hidden, config.intermediate
        gate, up = (rng.standard_normal((hidden, width), np.float32) / np.sqrt(np.float32(hidden)) for _ in range(2))
        down = rng.standard_normal((width, hidden), np.float32) / np.sqrt(np.float32(width))
        return cls(gate, up, down)

    def __call__(self, rows: Any, matmul: Callable[[Any, Any], Any] = np.matmul) -> Any:
        """float32 ``[n, H]`` of float32 ``[n, H]``; arrays of NumPy, or of CuPy like the weights."""
        gate = matmul(rows, self.gate)
        middle = gate / (1 + np.exp(-gate)) * matmul(rows, self.up)
        return matmul(middle, self.down)


class MoeLayer:
    """The layer over one text.

    Args:
        config: sizes and seed.
        text: the tokens.
    """

    def __init__(self, config: LayerConfig, text: bytes) -> None:
        self.config = config
        self._bytes = np.frombuffer(text, np.uint8)
        self._embedding = config.rng(_EMBEDDING).standard_normal((256, config.hidden), np.float32)

    @cached_property
    def _centroids(self) -> NDArray[np.float64]:
        shape = (self.config.hidden, self.config.num_experts)
        centroids: NDArray[np.float64] = self.config.rng(_CENTROIDS).standard_normal(shape) / np.sqrt(shape[0])
        return centroids

    def embed(self, tokens: NDArray[np.int64] | range) -> NDArray[Any]:
        """bfloat16 ``[T, H]``, the rows of these tokens (global indices): their bytes, mixed with their places."""
        indices = np.asarray(tokens, np.int64)
        half = self.config.hidden // 2
        angles = indices[:, None] * 10000.0 ** (-np.arange(half) / half)
        places = np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
        return (self._embedding[self._bytes[indices]] + np.float32(_POSITION_SCALE) * places).astype(BFLOAT16)

    def gate(self, x: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Experts of tokens and their weights: int64 and float32 ``[T, K]``, the best first.

        In float64: a BLAS adds up in an order that depends on the number of rows, and in float32 that could change
        which expert comes last among the chosen ones.
        """
        num_groups, num_kept = self.config.groups
        affinity = 1 / (1 + np.exp(-(x.astype(np.float64) @ self._centroids)))
        in_groups = np.sort(affinity.reshape(len(x), num_groups, self.config.num_experts // num_groups), axis=2)
        kept = np.argsort(-in_groups[:, :, -2:].sum(axis=2), axis=1, kind="stable")[:, :num_kept]
        allowed = create_grouped_scores(affinity, kept, num_groups)
        topk_idx = np.argsort(-allowed, axis=1, kind="stable")[:, : self.config.num_topk].astype(np.int64)
        chosen = np.take_along_axis(affinity, topk_idx, axis=1)
        weights = _ROUTE_SCALE * chosen / chosen.sum(axis=1, keepdims=True)
        return np.ascontiguousarray(topk_idx), weights.astype(np.float32)

    def dense(
        self, x: NDArray[Any], topk_idx: NDArray[np.int64], topk_weights: NDArray[np.float32]
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """The layer for all tokens in one process, without ranks: sums in float32, one rounding to bfloat16 each for
        the experts' sum and for the residual.

        Returns:
            The output, bfloat16 ``[T, H]``, and the sum of the experts' magnitudes ``|weight * y|``, float32
            ``[T, H]``, to which the error of other orders and more roundings is proportional.
        """
        total = np.zeros(x.shape, np.float32)
        magnitude = np.zeros(x.shape, np.float32)
        for index in range(self.config.num_experts):
            weights = np.where(topk_idx == index, topk_weights, 0).sum(axis=1, dtype=np.float32)
            tokens = np.flatnonzero(weights)
            if len(tokens):
                y = weights[tokens, None] * Expert.make(self.config, index)(x[tokens].astype(np.float32))
                total[tokens] += y
                magnitude[tokens] += np.abs(y)
        return self.residual(x, total.astype(BFLOAT16)), magnitude

    @staticmethod
    def residual(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        """``x + y`` in float32, rounded to bfloat16."""
        result: NDArray[Any] = (x.astype(np.float32) + y.astype(np.float32)).astype(BFLOAT16)
        return result
