"""Launch shapes for rows of any size: they fit shared memory, and their pieces cover the row."""

from __future__ import annotations

import pytest

from epcomm import config
from epcomm.backends.cuda.placement import default_num_sms, low_latency_num_sms
from epcomm.errors import CapacityError
from epcomm.kernels import (
    arguments,
    combine,
    dispatch,
    dispatch_layout,
    internode_combine,
    internode_dispatch,
    low_latency,
    low_latency_dispatch,
)
from epcomm.kernels.layout import MAX_RANKS, UNIT
from epcomm.kernels.rings import MAX_GROUPS, PLACES_BYTES, Message, Rings, words_bytes
from epcomm.kernels.rows import Pieces, stage_memory
from epcomm.kernels.window import PARTS, WINDOW_BYTES, Window

ROW_BYTES = [*range(16, 1200, 16), *range(1200, 60000, 1008), 14336, 14352, 28672, 28688, 100000, 262144, 1 << 20]
MAX_PIECE = 14336
# What a block may have on GPUs with a copy engine (compute capability 9.0 and 10.0, 12.0), and on those without.
MEMORIES = [stage_memory(227 * 1024, "90"), stage_memory(99 * 1024, "120"), stage_memory(163 * 1024, "80")]


def assert_covers(pieces: Pieces, row_bytes: int) -> None:
    assert pieces.row_bytes == row_bytes
    assert pieces.piece_bytes % 16 == 0
    last = row_bytes - (pieces.num_pieces - 1) * pieces.piece_bytes
    assert 0 < last <= pieces.piece_bytes
    assert last % 16 == 0


def assert_fits(threads: int, shared_bytes: int, memory: int, most: int) -> None:
    assert threads % 32 == 0
    assert 64 <= threads <= most  # two roles, each of whole warps; the bound that the kernels are compiled with
    assert shared_bytes <= (memory or 48 * 1024)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("is_windowed", [True, False])
@pytest.mark.parametrize("blocks_on_gpu", [1, 24, 128])
def test_dispatch(blocks_on_gpu, is_windowed, memory):
    for row_bytes in ROW_BYTES:
        shape = dispatch.shape(row_bytes, memory, blocks_on_gpu, is_windowed)
        assert_covers(shape.pieces, row_bytes)
        assert shape.pieces.piece_bytes <= MAX_PIECE
        assert_fits(shape.threads, shape.shared_bytes, memory, 768)
        num_warps = shape.threads // 32
        num_row_warps = num_warps - dispatch.BESIDE_WARPS * (1 + is_windowed)
        assert num_row_warps >= 2
        if memory:
            stages = dispatch.STAGES * (8 * num_warps + shape.pieces.piece_bytes * num_row_warps)
            assert stages <= shape.shared_bytes < stages + 128
        # Pieces of about equal size: none is short by more than 16 bytes for each piece.
        assert shape.pieces.piece_bytes * shape.pieces.num_pieces - row_bytes < 16 * shape.pieces.num_pieces


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8, 13, 31, 32])
def test_combine(num_ranks, memory):
    for row_bytes in ROW_BYTES:
        shape = combine.shape(row_bytes, num_ranks, memory)
        assert shape.piece_bytes % 16 == 0
        assert 16 <= shape.piece_bytes <= row_bytes
        assert_covers(shape.feed, row_bytes)
        # Rows on their way to the window use the stages of the rows that are pulled.
        assert shape.feed.piece_bytes <= shape.piece_bytes * num_ranks
        assert_fits(shape.threads, shape.shared_bytes, memory, 512)
        if memory:
            num_warps = shape.threads // 32
            stages = num_warps * combine.STAGES * (16 + shape.piece_bytes * num_ranks)
            assert stages <= shape.shared_bytes < stages + 128


def test_layout():
    for num_tokens in (0, 1, 255, 256, 257, 4096, 1 << 20):
        blocks = dispatch_layout.num_blocks(num_tokens)
        assert 1 <= blocks <= dispatch_layout.MAX_BLOCKS
        assert blocks == dispatch_layout.MAX_BLOCKS or blocks * dispatch_layout.THREADS >= num_tokens


@pytest.mark.parametrize("sizes", [(0, 0, 0), (20, 32, 16), (3, 8, 0), (1, 1, 4)])
def test_slots(sizes):
    """Fields do not overlap, and what is read in words starts at one."""
    for row_bytes in (16, 48, 14352):
        slot = dispatch.slot(row_bytes, *sizes)
        lengths = (row_bytes, *sizes, 4)
        ends = [start + length for start, length in zip(slot.fields, lengths, strict=False)]
        assert all(end <= start for end, start in zip(ends, slot.fields[1:5], strict=False))
        assert ends[-1] <= slot.num_bytes
        assert slot.num_bytes % 16 == 0
        assert all(start % 8 == 0 for start in slot.fields)


@pytest.mark.parametrize("max_tokens", [1, 2, 8, 100, 1024, 100000])
@pytest.mark.parametrize("max_piece", [2048, 4096])
def test_low_latency_pieces(max_tokens, max_piece):
    """Multiples of what a warp moves at once, that cover the row; enough of them, or as small as can be."""
    for row_bytes in ROW_BYTES:
        pieces = config.low_latency_pieces(row_bytes, max_tokens, max_piece)
        assert_covers(Pieces(row_bytes, *pieces), row_bytes)
        assert pieces.piece_bytes % 512 == 0
        assert 512 <= pieces.piece_bytes <= max_piece
        # A row of eleven columns and seven wanted pieces: two columns each make six.
        assert pieces.piece_bytes == 512 or 2 * max_tokens * pieces.num_pieces >= 512


@pytest.mark.parametrize("num_tokens", [0, 1, 33, 128, 5000, low_latency.MAX_TOKENS])
@pytest.mark.parametrize(("num_local", "num_ranks"), [(1, 1), (32, 8), (256, 8), (1024, 2), (64, 32)])
@pytest.mark.parametrize("num_topk", [1, 8, 32])
def test_low_latency_tables_fit(num_tokens, num_local, num_ranks, num_topk):
    words = low_latency_dispatch.num_words(num_tokens, num_local, num_ranks, num_topk)
    assert 1 <= words <= max(1, -(-num_tokens // 32))
    assert_fits(512, low_latency_dispatch.shared_bytes(num_local, num_ranks, num_topk, words), 99 * 1024, 512)
    assert low_latency_dispatch.shared_bytes(num_local, num_ranks, num_topk, words) <= (
        low_latency_dispatch.MAX_SHARED_BYTES
    )


@pytest.mark.parametrize("value", [*range(1, 70), 127, 128, 129, 255, 1000, 2048, (1 << 17) - 1, (1 << 31) - 1])
def test_divisor(value):
    multiplier, shift = arguments.divisor(value)
    assert 0 < multiplier < 1 << 32
    assert shift < 64
    most = (1 << 31) - 1
    near = {n for k in (0, 1, 2, most // value // 2, most // value) for n in range(k * value - 1, k * value + 2)}
    for n in {0, 1, most, most - 1} | {n for n in near if 0 <= n <= most}:
        assert n * multiplier >> shift == n // value


@pytest.mark.parametrize("num_ranks", [1, 3, 8, 32])
@pytest.mark.parametrize("num_bytes", [0, 1 << 20, 80 << 20])
@pytest.mark.parametrize("num_far", [0, 1, 7])
def test_low_latency_slots_do_not_overlap(num_bytes, num_ranks, num_far):
    area = low_latency.Area(4096, num_bytes, num_ranks, (1 << num_far) - 1)
    slots = [area.dispatch_slot(0), area.dispatch_slot(1), area.combine_slot(0), area.combine_slot(1)]
    end = 4096
    num_lanes = (num_ranks, num_ranks, config.COMBINE_LANES, config.COMBINE_LANES)
    for slot, lanes in zip(slots, num_lanes, strict=True):
        assert slot.rows == end
        assert slot.rows % UNIT == 0
        end += lanes * area.row_lane_bytes
    for slot, lanes in zip(slots, num_lanes, strict=True):
        assert slot.cells == end
        assert slot.cells % 16 == 0
        end += lanes * area.cell_lane_bytes
    assert end <= 4096 + num_bytes
    end = 4096 + num_bytes
    for slot in range(config.NUM_LOW_LATENCY_SLOTS if num_far else 0):  # what goes through the network
        assert area.dispatch_staging(slot) == end
        assert area.combine_staging(slot)[0] == end + area.row_lane_bytes
        assert area.combine_staging(slot)[1] == config.COMBINE_LANES * area.row_lane_bytes
        end += (1 + num_far * config.COMBINE_LANES) * area.row_lane_bytes
    assert area.end == end


def test_a_row_that_is_larger_than_a_window():
    for num_ranks in (1, 8, MAX_RANKS):
        most = WINDOW_BYTES // (PARTS * num_ranks) // UNIT * UNIT - UNIT - 4
        assert Window(num_ranks).cut(most).num_slots == 1
        with pytest.raises(CapacityError, match=f"^hidden: got rows of {most + 1} bytes .*; wanted at most {most}"):
            Window(num_ranks).cut(most + 1)


@pytest.mark.parametrize(
    ("sms", "ranks_on_gpu", "wanted"),
    [(132, 1, 24), (132, 5, 24), (132, 6, 22), (132, 8, 16), (132, 200, 1), (7, 1, 7)],
)
def test_default_number_of_sms(sms, ranks_on_gpu, wanted):
    assert default_num_sms(sms, ranks_on_gpu) == wanted
    assert wanted * ranks_on_gpu <= max(sms, ranks_on_gpu)


@pytest.mark.parametrize(
    ("sms", "ranks_on_gpu", "has_network", "wanted"),
    [
        (132, 1, False, 64),
        (108, 1, False, 54),
        (1, 1, False, 1),
        (132, 1, True, 24),
        (132, 2, False, 24),
        (132, 8, False, 16),
    ],
)
def test_default_number_of_sms_in_the_low_latency_mode(sms, ranks_on_gpu, has_network, wanted):
    assert low_latency_num_sms(sms, ranks_on_gpu, has_network) == wanted
    assert wanted * ranks_on_gpu <= sms


# -- several nodes ----------------------------------------------------------------------------------------------------

NODES = [(1, 2), (2, 1), (2, 2), (4, 2), (2, 4), (1, 8), (8, 2), (8, 4), (16, 2), (1, 32)]  # ranks of a node, nodes


@pytest.mark.parametrize("is_windowed", [False, True])
@pytest.mark.parametrize("is_staged", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("per_node", "num_nodes"), NODES)
def test_internode_dispatch(per_node, num_nodes, memory, is_staged, is_windowed):
    for blocks_on_gpu in (1, 24, 128):
        for row_bytes in ROW_BYTES:
            shape = internode_dispatch.shape(row_bytes, num_nodes, memory, blocks_on_gpu, is_staged, is_windowed)
            assert_covers(shape.pieces, row_bytes)
            assert_fits(shape.threads, shape.shared_bytes, memory, 768)
            assert min(shape.senders, shape.forwarders) >= 1
            assert (shape.takers >= 1) == is_windowed
            warps, roles = shape.senders + shape.forwarders + shape.takers, 3 if is_windowed else 2
            assert warps + roles * dispatch.BESIDE_WARPS == shape.threads // 32
            if memory:
                stages = internode_dispatch.STAGES * warps * (8 + shape.pieces.piece_bytes)
                assert stages <= shape.shared_bytes < stages + 128
    for row_bytes in ROW_BYTES:
        message = internode_dispatch.rows(row_bytes, is_staged)
        assert 1 <= message.unit_tokens <= 32
        assert message.unit_tokens <= 2 or not is_staged
        assert message.row_bytes >= PLACES_BYTES + row_bytes
        assert (PLACES_BYTES % UNIT, message.row_bytes % UNIT) == (0, 0)


@pytest.mark.parametrize("is_windowed", [False, True])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(("per_node", "num_nodes"), NODES)
def test_internode_combine(per_node, num_nodes, memory, is_windowed):
    for row_bytes in ROW_BYTES:
        shape = internode_combine.shape(row_bytes, per_node, num_nodes, memory, is_windowed)
        assert_fits(shape.threads, shape.shared_bytes, memory, 512)
        assert shape.feeding < shape.threads // 32
        assert (shape.feeding > 0) == is_windowed
        # Room for a piece from each source at once, of what a warp takes at a time at least; or for their addresses.
        sources = per_node + num_nodes - 1
        assert shape.stage_bytes >= sources * (min(512, row_bytes) if memory else 8)
        assert shape.stage_bytes % (16 if memory else 8) == 0
        messages = internode_combine.messages(row_bytes, 8, per_node)
        assert messages.asked.unit_tokens == messages.answered.unit_tokens
        assert messages.answered.row_bytes >= messages.weights + 4 * 8
        assert messages.asked.row_bytes >= 4 * per_node


@pytest.mark.parametrize(("is_staged", "is_common"), [(False, False), (True, False), (True, True)])
def test_rings_share_what_there_is(is_staged, is_common):
    rows, beside = Message(2, 14464, is_common), Message(8, 352)
    num_rings, num_common = (8, 5 if is_common else 8) if is_staged else (4, 4)
    words = words_bytes(4)
    for num_bytes in (words + (num_rings << 15) + 20000, words + (1 << 20), 10 << 20, 1 << 30):
        rings = Rings(4096, num_bytes, 5, 2, 4, is_staged=is_staged)
        assert rings.nodes == (4096, 2, 4, 2, 1)
        first, second = rings.cut((rows, beside), (256, 128))
        assert first.offset >= words
        assert second.offset == first.offset + num_common * first.num_groups * first.group_bytes
        assert second.offset + num_rings * second.num_groups * second.group_bytes <= num_bytes
        assert 1 <= first.num_groups <= 256
        assert 1 <= second.num_groups <= 128
    assert (first.num_groups, second.num_groups) == (256, 128)  # with room for all
    assert rings.has_room(rows, beside)
    assert not Rings(4096, words + (num_common << 16), 5, 2, 4, is_staged=is_staged).has_room(rows, beside)
    assert MAX_GROUPS >= internode_combine.WANTED_GROUPS
    with pytest.raises(CapacityError, match="num_rdma_bytes"):
        Rings(4096, words, 0, 2, 4, is_staged=is_staged)
    with pytest.raises(CapacityError, match="num_rdma_bytes"):
        Rings(4096, words + (num_rings << 14), 0, 2, 4, is_staged=is_staged).cut((rows, beside), (256, 128))
