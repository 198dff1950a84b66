"""What Python and CUDA say of the same memory is the same: the compiler compares every offset, size and number."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from helpers.nvrtc import compile_cubin, needs_nvshmem, needs_offsetof

from epcomm.backends.cuda import page
from epcomm.config import MAX_LOW_LATENCY_PIECE, NUM_LOW_LATENCY_SLOTS
from epcomm.errors import CompileError
from epcomm.kernels import (
    arguments,
    combine,
    dispatch,
    dispatch_layout,
    exchange,
    internode_combine,
    internode_dispatch,
    layout,
    link_probe,
    low_latency,
    low_latency_combine,
    low_latency_dispatch,
    low_latency_service,
    network_probe,
    window,
)

WINDOW = ("window.offset", "window.area_bytes", "window.slot_bytes", "window.num_slots")


def array(name: str, count: int) -> list[str]:
    return [f"{name}[{index}]" for index in range(count)]


def words(names: str) -> list[str]:
    return names.split()


def divisors(*names: str) -> list[str]:
    return [f"{name}.{part}" for name in names for part in ("multiplier", "shift")]


def pieces(name: str) -> list[str]:
    return [f"{name}.row_bytes", f"{name}.piece_bytes", f"{name}.num_pieces"]


def ring(name: str) -> list[str]:
    fields = words("offset num_groups group_bytes row_bytes unit_tokens")
    return [f"{name}.{field}" for field in fields]


NODES = words("nodes.area nodes.ranks_per_node nodes.num_nodes nodes.own nodes.local")
ENTRY = (
    *("entry.rows", "entry.metadata", "entry.num_tokens", "entry.unused"),
    *array("entry.agreed", layout.NUM_ENTRY_AGREED),
)

# Struct -> (source, where its fields begin, what Python packs, names of the fields in that order).
STRUCTS = {
    "Comm": (
        "common/layout.cuh",
        0,
        arguments.COMM,
        [
            *array("region", layout.MAX_RANKS),
            *array("control", layout.MAX_RANKS),
            *array("pe", layout.MAX_RANKS),
            "host",
            "region_bytes",
            "timeout_ns",
            "rank",
            "num_ranks",
        ],
    ),
    "LayoutArgs": (
        "kernels/dispatch_layout.cu",
        0,
        dispatch_layout.FIELDS,
        words(
            "topk_idx tokens_per_rank tokens_per_node tokens_per_expert is_token_in_rank partial ticket "
            "num_tokens num_topk index_bytes num_experts num_ranks ranks_per_node"
        ),
    ),
    "ExchangeArgs": (
        "kernels/exchange.cu",
        arguments.COMM.size,
        exchange.FIELDS,
        [
            *words("is_token_in_rank tokens_per_rank tokens_per_expert send_pos rank_prefix node_counts"),
            *words("num_tokens num_local_experts status tag is_awaited capacity"),
            *array("agreed", layout.NUM_AGREED),
            *words("num_nodes unused"),
        ],
    ),
    "DispatchArgs": (
        "kernels/dispatch.cu",
        arguments.COMM.size,
        dispatch.FIELDS,
        [
            *WINDOW,
            *ENTRY,
            *array("slot_field", 5),
            "unused",
            *words("x scales scale_stride_token scale_stride_scale"),
            *words("topk_idx topk_weights send_pos rank_prefix"),
            *array("out", 5),
            *pieces("pieces"),
            *words("stage_bytes num_scales scale_bytes num_topk index_bytes num_local_experts"),
            *words("num_worst_tokens is_forced has_weights"),
        ],
    ),
    "CombineArgs": (
        "kernels/combine.cu",
        arguments.COMM.size,
        combine.FIELDS,
        [
            *WINDOW,
            *ENTRY,
            *words("slot_weights piece_bytes"),
            *words("x x_weights src_idx send_pos rank_prefix bias[0] bias[1] out out_weights"),
            *pieces("feed"),
            *words("row_bytes num_topk num_worst_tokens"),
        ],
    ),
    "InternodeDispatchArgs": (
        "kernels/internode_dispatch.cu",
        arguments.COMM.size,
        internode_dispatch.FIELDS,
        [
            *NODES,
            *ring("rows"),
            *ring("beside"),
            *[name.replace("nodes.", "handed.", 1) for name in NODES],
            *ring("handed_rows"),
            *ring("handed_beside"),
            *ENTRY,
            *array("slot_field", 5),
            *words("has_metadata x scales scale_stride_token scale_stride_scale"),
            *words("topk_idx topk_weights send_pos rank_prefix"),
            *array("out", 5),
            "node_counts",
            *pieces("pieces"),
            *words("stage_bytes num_scales scale_bytes num_topk index_bytes num_local_experts"),
            *words("num_worst_tokens is_forced has_weights num_senders num_forwarders num_takers unused"),
        ],
    ),
    "InternodeCombineArgs": (
        "kernels/internode_combine.cu",
        arguments.COMM.size,
        internode_combine.FIELDS,
        [
            *NODES,
            *ring("asked"),
            *ring("answered"),
            *[name.replace("nodes.", "handed.", 1) for name in NODES],
            *ring("fed"),
            *ENTRY,
            *words("x x_weights src_idx send_pos rank_prefix bias[0] bias[1] out out_weights"),
            *words("row_bytes stage_bytes answer_weights num_topk num_worst_tokens num_feeding"),
        ],
    ),
}

SLOT = [
    *words("slot.rows slot.cells slot.operation slot.halves slot.is_rejected slot.leaves_late"),
    *words("slot.digest slot.far"),
    *array("slot.agreed", layout.NUM_ENTRY_AGREED),
]
STRUCTS |= {
    "LowLatencyDispatchArgs": (
        "kernels/low_latency_dispatch.cu",
        arguments.COMM.size,
        low_latency_dispatch.FIELDS,
        [
            *SLOT,
            *words(
                "row_lane_bytes cell_lane_bytes row_stride staging x topk_idx send_info recv_x recv_scales recv_count"
            ),
            *words("src_info layout_range messages num_messages expert_stats wait_stats"),
            *divisors("by_topk", "by_local", "by_pieces"),
            *words("scales piece_bytes num_pieces num_words hidden num_tokens"),
            *words("num_topk index_bytes num_local_experts max_tokens"),
        ],
    ),
    "LowLatencyCombineArgs": (
        "kernels/low_latency_combine.cu",
        arguments.COMM.size,
        low_latency_combine.FIELDS,
        [
            *SLOT,
            *array("buffer", layout.MAX_RANKS),
            *words("staging staging_bytes"),
            *words("x topk_idx topk_weights send_info layout_range messages num_messages out wait_stats"),
            *words("row_bytes wire_bytes piece_bytes num_pieces"),
            *words("is_pulled num_tokens num_topk index_bytes num_local_experts max_tokens"),
            *divisors("by_local", "by_pieces"),
        ],
    ),
    "LowLatencyServiceArgs": (
        "kernels/low_latency_service.cu",
        arguments.COMM.size,
        low_latency_service.FIELDS,
        [
            *words("operation leaves_late set clear masks sequences"),
            *array("resume", 2 * NUM_LOW_LATENCY_SLOTS),
        ],
    ),
    "LinkProbeArgs": (
        "kernels/link_probe.cu",
        0,
        link_probe.FIELDS,
        [
            *array("region", layout.MAX_RANKS),
            "own",
            *pieces("pieces"),
            *words("num_rows rank num_ranks is_reading unused"),
        ],
    ),
}

CONSTANTS = {
    "kMaxRanks": layout.MAX_RANKS,
    "kMaxLocalExperts": layout.MAX_LOCAL_EXPERTS,
    "kMaxTopk": layout.MAX_TOPK,
    "kNumAgreed": layout.NUM_AGREED,
    "kNumEntryAgreed": layout.NUM_ENTRY_AGREED,
    "kUnit": layout.UNIT,
    "kWorkspaceBytes": layout.WORKSPACE_BYTES,
    "kMaxQueuePairs": layout.MAX_QUEUE_PAIRS,
    "kQueuePairsOffset": layout.QUEUE_PAIRS_OFFSET,
    "sizeof(QueuePairs)": len(layout.queue_pairs_bytes(())),
    "kThroughWindow": layout.THROUGH_WINDOW,
    "kRejected": layout.REJECTED,
    "kNoBlock": layout.NO_BLOCK,
    "kNumSlots": NUM_LOW_LATENCY_SLOTS,
    "kNumOperations": len(layout.OPERATIONS),
    "kTimeout": page._TIMEOUT,
    "kPoisoned": page._POISONED,
    "kAborted": page._ABORTED,
    "kConcurrent": page._CONCURRENT,
    "kBadOffset": page._BAD_OFFSET,
    "kMove": page._MOVE,
    "kVoid": page._VOID,
    **{
        name: layout.PHASES.index(phase)
        for name, phase in {
            "kPhaseCounts": "counts",
            "kPhaseEntry": "entry",
            "kPhaseDone": "done",
            "kPhaseReady": "ready",
            "kPhaseAck": "ack",
        }.items()
    },
    **{
        name: layout.OPERATIONS.index(operation)
        for name, operation in {
            "kExchange": "dispatch, counts",
            "kDispatch": "dispatch",
            "kCombine": "combine",
            "kBarrier": "barrier",
            "kLowLatencyDispatch": "low_latency_dispatch",
            "kLowLatencyCombine": "low_latency_combine",
        }.items()
    },
}


def packed_fields(fields: struct.Struct) -> Iterator[tuple[int, int, bool]]:
    """(offset, bytes, signed) of each value that `fields` packs."""
    offset = 0
    for count, letter in re.findall(r"(\d*)([QqIiHh])", fields.format):
        for _ in range(int(count or 1)):
            num_bytes = struct.calcsize(f"<{letter}")
            yield offset, num_bytes, letter.islower()
            offset += num_bytes


def same(condition: str) -> str:
    return f'static_assert({condition}, "differs");\n'


IS_SIGNED = """
template <typename T> struct Value { static constexpr bool is_signed = T(-1) < T(0); };
template <typename T> struct Value<T&> : Value<T> {};
#define is_signed(value) (Value<decltype((value))>::is_signed)
"""


def assert_compiles(source: str, assertions: str) -> None:
    compile_cubin(f'#include "{source}"\nnamespace epcomm {{{IS_SIGNED}{assertions}}}\n', "90")


def test_the_tables_are_complete():
    for name, (_, _, fields, names) in STRUCTS.items():
        assert len(names) == len(list(packed_fields(fields))), name
        assert len(set(names)) == len(names), name


@needs_offsetof
@pytest.mark.parametrize("name", STRUCTS)
def test_arguments(name):
    source, start, fields, names = STRUCTS[name]
    assertions = same(f"sizeof({name}) == {start + fields.size}")
    for field, (offset, num_bytes, is_signed) in zip(names, packed_fields(fields), strict=True):
        value = f"(({name}*)0)->{field}"
        assertions += same(f"__builtin_offsetof({name}, {field}) == {start + offset} /* {field} */")
        assertions += same(f"sizeof({value}) == {num_bytes} /* {field} */")
        assertions += same(f"is_signed({value}) == {str(is_signed).lower()} /* {field} */")
    assert_compiles(source, assertions)


@needs_offsetof
def test_host_page():
    assertions = same(f"sizeof(HostPage) == {layout.HOST_PAGE.itemsize}")
    for name, (dtype, offset) in layout.HOST_PAGE.fields.items():
        assertions += same(f"__builtin_offsetof(HostPage, {name}) == {offset} /* {name} */")
        assertions += same(f"sizeof(((HostPage*)0)->{name}) == {np.dtype(dtype).itemsize} /* {name} */")
    assert_compiles("common/layout.cuh", assertions)


@needs_offsetof
def test_numbers():
    assert_compiles("common/layout.cuh", "".join(same(f"{name} == {value}u") for name, value in CONSTANTS.items()))
    assert_compiles("kernels/exchange.cu", same(f"kStatusCounts == {exchange.STATUS_COUNTS}"))
    assert_compiles("kernels/exchange.cu", same(f"kThreads == {exchange.THREADS}"))


@needs_offsetof
def test_numbers_of_low_latency():
    dispatched = {
        "kThreads": low_latency.THREADS,
        "kSend": low_latency.SEND,
        "kReceive": low_latency.RECEIVE,
        "1 << kTokenBits": low_latency.MAX_TOKENS,
        "kSendVectors * kColumn": MAX_LOW_LATENCY_PIECE,
        "kExact": low_latency_dispatch.EXACT,
        "kPowerOfTwo": low_latency_dispatch.POWER_OF_TWO,
        "kExponents": low_latency_dispatch.EXPONENTS,
    }
    combined = {
        "kThreads": low_latency.THREADS,
        "kPushColumns * kColumn": MAX_LOW_LATENCY_PIECE,
        "kDepth": low_latency_combine.DEPTH,
        "kRows": low_latency_combine.ROWS,
        "kEncodedRows": low_latency_combine.ENCODED_ROWS,
        "kPartialSums": low_latency_combine.PARTIAL_SUMS,
    }
    for source, numbers in (("dispatch", dispatched), ("combine", combined)):
        assertions = "".join(same(f"({name}) == {value}u") for name, value in numbers.items())
        assert_compiles(f"kernels/low_latency_{source}.cu", assertions)


@needs_offsetof
def test_a_difference_is_noticed():
    for wrong in ("sizeof(Comm) == 284", "__builtin_offsetof(Comm, rank) == 284", "kUnit == 64"):
        with pytest.raises(CompileError, match="differs"):
            assert_compiles("common/layout.cuh", same(wrong))


def test_every_window_fits():
    for num_ranks in range(1, layout.MAX_RANKS + 1):
        cut = window.Window(num_ranks).cut(1000)
        assert cut.offset == layout.WORKSPACE_BYTES
        assert 2 * num_ranks * cut.area_bytes <= window.WINDOW_BYTES
        assert cut.area_bytes % layout.UNIT == 0
        assert 0 < cut.num_slots * cut.slot_bytes <= cut.area_bytes


NETWORK_PROBE = {
    "NetworkProbeArgs": (
        network_probe.FIELDS,
        words(
            "receive send cells report elapsed_ns area_bytes num_bytes timeout_ns first num_rounds rank previous_rank "
            "next_pe previous_pe by_block"
        ),
    ),
    "NetworkProbeReport": (network_probe.REPORT, words("error num_done num_wrong awaited_pe")),
}


@needs_offsetof
@needs_nvshmem
def test_network_probe():
    assertions = same(f"sizeof(NetworkProbeCells) == {network_probe.CELLS_BYTES}")
    for name, (fields, names) in NETWORK_PROBE.items():
        assertions += same(f"sizeof({name}) == {fields.size}")
        for field, (offset, num_bytes, is_signed) in zip(names, packed_fields(fields), strict=True):
            value = f"(({name}*)0)->{field}"
            assertions += same(f"__builtin_offsetof({name}, {field}) == {offset} /* {field} */")
            assertions += same(f"sizeof({value}) == {num_bytes} /* {field} */")
            assertions += same(f"is_signed({value}) == {str(is_signed).lower()} /* {field} */")
    source = f'#include "{network_probe.PROGRAM.source}"\nnamespace epcomm {{{IS_SIGNED}{assertions}}}\n'
    compile_cubin(source, "90", nvshmem=True)
