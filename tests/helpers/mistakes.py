"""The tables of wrong calls: mistakes of one rank, and disagreements between ranks.

Every entry changes some keywords of a call that is right; `helpers.calls` makes it and checks what comes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from helpers import moe
from helpers.calls import Disagreement, Keywords, Mistake, Scene

from epcomm import Config
from epcomm.dlpack import CUDA, Exporter
from epcomm.errors import (
    CapacityError,
    DeviceError,
    DtypeError,
    HandleError,
    InputError,
    LayoutError,
    RoutingError,
    ShapeError,
)
from epcomm.testing import token_data


def unaligned(array: Any) -> Any:
    """A copy that starts 2 bytes past a multiple of 16."""
    base = np.empty(array.nbytes + 32, np.uint8)
    start = -base.ctypes.data % 16 + 2
    copy = base[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _with_first_row(topk_idx: Any, row: list[int]) -> Any:
    changed = topk_idx.copy()
    changed[0] = row
    return changed


def _wide(scene: Scene, hidden: int) -> Any:
    return token_data(len(scene.mine.x), hidden, moe.BFLOAT16)


def _bias(scene: Scene) -> Any:
    return np.zeros_like(scene.mine.x)


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def _x(change: Callable[[Any], Any]) -> Callable[[Scene], Keywords]:
    """Change what the right call passes as x."""
    return lambda s: {"x": change(s.mine.x if s.received is None else s.received.recv_x)}


def _index(change: Callable[[Any], Any]) -> Callable[[Scene], Keywords]:
    return lambda s: {"topk_idx": change(s.mine.topk_idx)}


def _fixed(**keywords: Any) -> Callable[[Scene], Keywords]:
    return lambda _: keywords


# What is wrong with rows is the same in all operations that take rows.
_BAD_ROWS = tuple(
    Mistake(name, operation, change, error, message)
    for operation in ("dispatch", "combine")
    for name, change, error, message in (
        ("x_is_a_list", _x(lambda x: x.tolist()), DtypeError, "^x: got a list"),
        ("x_of_wrong_dtype", _x(lambda x: x.astype(np.float64)), DtypeError, "^x: got dtype float64; wanted bfloat16"),
        ("x_of_wrong_rank", _x(lambda x: x.reshape(-1)), ShapeError, "^x: got shape .*; wanted 2 dimensions"),
        ("x_not_contiguous", _x(lambda x: np.repeat(x, 2, axis=1)[:, ::2]), LayoutError, "^x: got strides"),
        ("x_unaligned", _x(unaligned), LayoutError, "^x: got memory 2 bytes past a multiple of 16"),
        ("x_on_a_gpu", _x(lambda x: Exporter(x, x.dtype, (CUDA, 99))), DeviceError, "^x: got an array on cuda:99"),
        ("x_masked", _x(lambda x: np.ma.masked_array(x)), InputError, "^x: got a masked array"),
        ("x_with_odd_rows", _x(lambda x: x[:, :7].copy()), ShapeError, r"^x: got hidden 7 \(14 bytes a row\)"),
        ("x_without_channels", _x(lambda x: x[:, :0].copy()), ShapeError, r"^x: got hidden 0"),
    )
)

_DISPATCH = tuple(
    Mistake(name, "dispatch", change, error, message)
    for name, change, error, message in (
        ("topk_idx_of_wrong_dtype", _index(lambda i: i.astype(np.int16)), DtypeError, "^topk_idx: got dtype int16"),
        ("topk_idx_too_short", _index(lambda i: i[1:].copy()), ShapeError, r"^topk_idx: got shape \[\d+, 3\]"),
        ("topk_idx_without_choices", _index(lambda i: i[:, :0].copy()), ShapeError, "^topk_idx: got num_topk 0"),
        (
            "topk_33",
            lambda s: {"topk_idx": np.full((len(s.mine.x), 33), -1), "topk_weights": None},
            ShapeError,
            "^topk_idx: got num_topk 33; wanted 1 to 32",
        ),
        (
            "weights_of_wrong_dtype",
            lambda s: {"topk_weights": s.mine.topk_weights.astype(np.float64)},
            DtypeError,
            "^topk_weights: got dtype float64; wanted float32",
        ),
        (
            "weights_of_wrong_shape",
            lambda s: {"topk_weights": s.mine.topk_weights[:, :1].copy()},
            ShapeError,
            "^topk_weights: got shape",
        ),
        ("weights_without_indices", _fixed(topk_idx=None), InputError, "^topk_weights: got weights without topk_idx"),
        ("no_layout", _fixed(is_token_in_rank=None), InputError, "^dispatch: got neither a handle nor the whole"),
        (
            "mask_of_wrong_shape",
            lambda s: {"is_token_in_rank": s.layout.is_token_in_rank[:1].copy()},
            ShapeError,
            "^is_token_in_rank: got shape",
        ),
        (
            "counts_against_the_mask",
            lambda s: {"num_tokens_per_rank": s.layout.num_tokens_per_rank + np.int32(1)},
            RoutingError,
            "^num_tokens_per_rank: got .*pass what get_dispatch_layout returned",
        ),
        (
            "experts_not_divisible_by_ranks",
            lambda s: {"num_tokens_per_expert": np.zeros(s.num_experts + 1, np.int32)},
            ShapeError,
            "^num_experts: got .*; wanted a multiple of the",
        ),
        ("negative_worst_case", _fixed(num_worst_tokens=-1), ShapeError, "^num_worst_tokens: got -1"),
        ("alignment_0", _fixed(expert_alignment=0), ShapeError, "^expert_alignment: got 0"),
        (
            "config_of_wrong_type",
            _fixed(config=(20, 6, 256)),
            InputError,
            "^config: got a tuple; wanted an epcomm.Config",
        ),
        (
            "scales_too_short",
            lambda s: {"x": (s.mine.x, np.zeros((1, 4), np.float32))},
            ShapeError,
            r"^scales: got shape \[1, 4\]; wanted",
        ),
        (
            "scales_of_8_bytes",
            lambda s: {"x": (s.mine.x, np.zeros((len(s.mine.x), 4)))},
            DtypeError,
            "^scales: got float64; wanted elements of 1, 2 or 4 bytes",
        ),
    )
)

_CHECKED = tuple(
    Mistake(name, operation, _index(change), RoutingError, message, checked_routing=True)
    for operation in ("dispatch", "low_latency_dispatch")
    for name, change, message in (
        ("expert_too_large", lambda i: _with_first_row(i, [0, 999, 1]), r"^topk_idx\[0, 1\]: got 999; wanted -1 or"),
        ("expert_below_minus_1", lambda i: _with_first_row(i, [-2, 0, 1]), r"^topk_idx\[0, 0\]: got -2; wanted -1 or"),
        ("expert_twice", lambda i: _with_first_row(i, [1, -1, 1]), r"^topk_idx\[0\]: got expert 1 more than once"),
    )
)

_CACHED_DISPATCH = tuple(
    Mistake(name, "cached_dispatch", change, error, message)
    for name, change, error, message in (
        ("no_handle", _fixed(handle=(1, 2, 3)), HandleError, "^handle: got a tuple; wanted the handle that dispatch"),
        ("other_number_of_tokens", _x(lambda _: np.zeros((1, 64), np.float32)), HandleError, "^x: got 1 tokens"),
        (
            "indices_beside_a_handle",
            _index(lambda i: i),
            InputError,
            r"^dispatch\(handle=\.\.\.\): got topk_idx or topk_w",
        ),
        ("other_worst_case", _fixed(num_worst_tokens=9), HandleError, "^num_worst_tokens: got 9; wanted that of the h"),
        ("x_of_wrong_dtype", lambda s: {"x": s.mine.x.astype(np.int64)}, DtypeError, "^x: got dtype int64"),
    )
)

_COMBINE = tuple(
    Mistake(name, "combine", change, error, message)
    for name, change, error, message in (
        (
            "rows_missing",
            _x(lambda x: x[1:].copy()),
            HandleError,
            r"^x: got \d+ rows; wanted the \d+ that the dispatch",
        ),
        ("x_of_bytes", _x(lambda x: x.view(np.uint8)), DtypeError, "^x: got dtype uint8; wanted bfloat16"),
        ("no_handle", _fixed(handle=None), HandleError, "^handle: got a NoneType"),
        (
            "bias_of_wrong_dtype",
            lambda s: {"bias": _bias(s).astype(np.float32)},
            DtypeError,
            "^bias: got dtype float32",
        ),
        ("bias_of_wrong_shape", lambda s: {"bias": _bias(s)[1:]}, ShapeError, "^bias: got shape"),
        ("three_biases", lambda s: {"bias": (_bias(s),) * 3}, InputError, "^bias: got 3 arrays; wanted None, one"),
        (
            "weights_of_wrong_dtype",
            lambda s: {"topk_weights": s.received.recv_topk_weights.astype(np.float16)},
            DtypeError,
            "^topk_weights: got dtype float16",
        ),
        (
            "weights_too_short",
            lambda s: {"topk_weights": s.received.recv_topk_weights[1:].copy()},
            ShapeError,
            "^topk_weights: got shape",
        ),
    )
)

_LOW_LATENCY_DISPATCH = tuple(
    Mistake(name, "low_latency_dispatch", change, error, message)
    for name, change, error, message in (
        (
            "more_tokens_than_declared",
            _fixed(num_max_dispatch_tokens_per_rank=2),
            CapacityError,
            r"^x: got \d tokens; wanted at most num_max_dispatch_tokens_per_rank, 2",
        ),
        ("room_for_no_token", _fixed(num_max_dispatch_tokens_per_rank=0), ShapeError, "^num_max_dispatch_tokens_per_r"),
        (
            "experts_not_divisible_by_ranks",
            lambda s: {"num_experts": s.num_experts + 1},
            ShapeError,
            "^num_experts: got",
        ),
        ("x_of_wrong_dtype", _x(lambda x: x.astype(np.float16)), DtypeError, "^x: got dtype float16; wanted bfloat16"),
        (
            "fp8_of_hidden_192",
            lambda s: {"x": _wide(s, 192), "use_fp8": True},
            ShapeError,
            "^x: got hidden 192; wanted a",
        ),
        (
            "exponents_of_scales_that_are_no_powers",
            _fixed(use_fp8=True, use_ue8m0=True),
            InputError,
            "^use_ue8m0: got round_scale=False; .*pass round_scale=True",
        ),
        ("event_and_hook", _fixed(async_finish=True, return_recv_hook=True), InputError, "^async_finish: got also ret"),
        (
            "counts_of_wrong_dtype",
            _fixed(cumulative_local_expert_recv_stats=np.zeros(moe.NUM_LOCAL_EXPERTS, np.int64)),
            DtypeError,
            "^cumulative_local_expert_recv_stats: got dtype int64; wanted int32",
        ),
        (
            "counts_of_wrong_shape",
            _fixed(cumulative_local_expert_recv_stats=np.zeros(1, np.int32)),
            ShapeError,
            r"^cumulative_local_expert_recv_stats: got shape \[1\]",
        ),
        (
            "waits_read_only",
            lambda s: {"dispatch_wait_recv_cost_stats": _read_only(np.zeros(s.buffer.group_size, np.int64))},
            InputError,
            "^dispatch_wait_recv_cost_stats: got a read-only",
        ),
        ("topk_idx_too_short", _index(lambda i: i[1:].copy()), ShapeError, "^topk_idx: got shape"),
    )
)

_LOW_LATENCY_COMBINE = tuple(
    Mistake(name, "low_latency_combine", change, error, message)
    for name, change, error, message in (
        (
            "fewer_choices_than_the_dispatch",
            lambda s: {"topk_idx": s.mine.topk_idx[:, :1].copy(), "topk_weights": s.mine.topk_weights[:, :1].copy()},
            ShapeError,
            "^topk_idx: got 1 choices a token; wanted the [0-9]+ of the dispatch",
        ),
        (
            "pre_reduce_and_logfmt",
            _fixed(pre_reduce=True, use_logfmt=True),
            InputError,
            "^pre_reduce: got also use_logfmt; wanted one of the two",
        ),
        (
            "pre_reduce_and_zero_copy",
            _fixed(pre_reduce=True, zero_copy=True),
            InputError,
            "^pre_reduce: got also zero_copy; wanted one of the two",
        ),
        ("zero_copy_without_buffer", _fixed(zero_copy=True), InputError, "^zero_copy: got no buffer of this handle"),
        ("event_and_hook", _fixed(async_finish=True, return_recv_hook=True), InputError, "^async_finish: got also ret"),
        ("no_handle", _fixed(handle=(1, 2)), HandleError, "^handle: got a tuple; wanted the handle that low_latency"),
        ("x_of_wrong_shape", lambda s: {"x": s.arrived.recv_x[:1]}, ShapeError, "^x: got shape"),
        ("topk_idx_too_short", _index(lambda i: i[1:].copy()), ShapeError, "^topk_idx: got shape"),
        (
            "weights_of_wrong_dtype",
            lambda s: {"topk_weights": s.mine.topk_weights.astype(np.float64)},
            DtypeError,
            "^topk_weights: got dtype float64",
        ),
        (
            "out_of_wrong_shape",
            lambda s: {"out": np.zeros((1, 8), moe.BFLOAT16)},
            ShapeError,
            r"^out: got shape \[1, 8\]",
        ),
        (
            "out_of_wrong_dtype",
            lambda s: {"out": np.zeros(s.mine.x.shape, "f4")},
            DtypeError,
            "^out: got dtype float32",
        ),
        ("out_read_only", lambda s: {"out": _read_only(s.mine.x.copy())}, InputError, "^out: got a read-only"),
    )
)

MISTAKES: tuple[Mistake, ...] = (
    *_BAD_ROWS,
    *_DISPATCH,
    *_CHECKED,
    *_CACHED_DISPATCH,
    *_COMBINE,
    *_LOW_LATENCY_DISPATCH,
    *_LOW_LATENCY_COMBINE,
)

_OTHER_CONFIG = Config(20, 1, 2, 1, 2)

DISAGREEMENTS: tuple[Disagreement, ...] = tuple(
    Disagreement(name, operation, change, differing)
    for operation, name, change, differing in (
        ("dispatch", "hidden", lambda s: {"x": _wide(s, 64)}, ("hidden",)),
        ("dispatch", "dtype", lambda s: {"x": s.mine.x.astype(np.float32)}, ("dtype",)),
        (
            "dispatch",
            "num_topk",
            lambda s: {"topk_idx": s.mine.topk_idx[:, :2].copy(), "topk_weights": s.mine.topk_weights[:, :2].copy()},
            ("num_topk",),
        ),
        (
            "dispatch",
            "no_topk",
            _fixed(topk_idx=None, topk_weights=None),
            ("num_topk", "topk_idx itemsize", "topk_weights"),
        ),
        (
            "dispatch",
            "num_experts",
            lambda s: {"num_tokens_per_expert": np.zeros(2 * s.num_experts, np.int32)},
            ("num_experts",),
        ),
        ("dispatch", "index_dtype", _index(lambda i: i.astype(np.int32)), ("topk_idx itemsize",)),
        ("dispatch", "weights", _fixed(topk_weights=None), ("topk_weights",)),
        ("dispatch", "worst_case", _fixed(num_worst_tokens=64), ("num_worst_tokens",)),
        ("dispatch", "alignment", _fixed(expert_alignment=8), ("expert_alignment",)),
        (
            "dispatch",
            "scales",
            lambda s: {"x": (s.mine.x, np.zeros(len(s.mine.x), "f4"))},
            ("num_scales", "scales_itemsize"),
        ),
        (
            "dispatch",
            "config",
            _fixed(config=_OTHER_CONFIG),
            ("config nvl_send", "config nvl_recv", "config rdma_send", "config rdma_recv"),
        ),
        ("cached_dispatch", "hidden", lambda s: {"x": _wide(s, 64)}, ("hidden",)),
        ("combine", "dtype", lambda s: {"x": s.received.recv_x.astype(np.float16)}, ("dtype",)),
        ("combine", "weights", _fixed(topk_weights=None), ("num_topk",)),
        ("low_latency_dispatch", "hidden", lambda s: {"x": _wide(s, 256)}, ("hidden",)),
        ("low_latency_dispatch", "num_topk", _index(lambda i: i[:, :1].copy()), ("num_topk",)),
        ("low_latency_dispatch", "num_experts", lambda s: {"num_experts": 2 * s.num_experts}, ("num_experts",)),
        (
            "low_latency_dispatch",
            "num_max",
            _fixed(num_max_dispatch_tokens_per_rank=32),
            ("num_max_dispatch_tokens_per_rank",),
        ),
        ("low_latency_dispatch", "fp8", _fixed(use_fp8=True), ("use_fp8",)),
        ("low_latency_dispatch", "scales", _fixed(use_fp8=True, round_scale=True), ("use_fp8", "round_scale")),
        ("low_latency_combine", "logfmt", _fixed(use_logfmt=True), ("use_logfmt",)),
        ("low_latency_combine", "pre_reduce", _fixed(pre_reduce=True), ("pre_reduce",)),
    )
)
