"""A program for DeepEP V1, of which only the imports were changed. Not a test: test_deep_ep.py runs it.

It uses the documented calls in the documented way, on CPU tensors, and checks every result by value. The row of token g
of all ranks says g: blocks of 128 channels hold its two hexadecimal digits in turn. So any rank knows what any row must
be, and constant blocks of such numbers survive every fp8 format exactly.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

import epcomm.interop.deep_ep as deep_ep
from epcomm.interop.deep_ep.utils import EventHandle, EventOverlap

NUM_TOKENS, HIDDEN, NUM_TOPK, NUM_LOCAL_EXPERTS = 24, 1024, 4, 4


class Job:
    """The routing of all ranks, and the checks."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks, self.num_experts = rank, num_ranks, NUM_LOCAL_EXPERTS * num_ranks
        generator = torch.Generator().manual_seed(7)
        scores = torch.rand(num_ranks * NUM_TOKENS, self.num_experts, generator=generator)
        self.all_topk_idx = torch.topk(scores, NUM_TOPK, dim=-1).indices.to(deep_ep.topk_idx_t)
        self.all_topk_idx[::5, 1] = -1
        self.all_topk_idx[3] = -1
        # Powers of two: sums of a few of them are exact in any order.
        weights = torch.tensor([1.0, 0.5, 0.25, 0.125]).expand(len(scores), NUM_TOPK)
        self.all_topk_weights = weights.contiguous()
        tokens = torch.arange(len(scores))
        digits = torch.stack([tokens // 16, tokens % 16], dim=1).bfloat16()
        self.all_x = digits.repeat_interleave(128, dim=1).repeat(1, HIDDEN // 256)
        own = slice(rank * NUM_TOKENS, (rank + 1) * NUM_TOKENS)
        self.x, self.topk_idx = self.all_x[own], self.all_topk_idx[own]
        self.topk_weights = self.all_topk_weights[own]
        all_ranks = torch.where(self.all_topk_idx < 0, -1, self.all_topk_idx // NUM_LOCAL_EXPERTS)
        self.all_in_rank = (all_ranks[:, :, None] == torch.arange(num_ranks)).any(dim=1)
        self.in_rank = self.all_in_rank[own]
        self.received = self.all_in_rank[:, rank].nonzero()[:, 0]  # global tokens, in the order of arrival

    def per_source(self, destination: int) -> torch.Tensor:
        return self.all_in_rank[:, destination].view(self.num_ranks, -1).sum(dim=1)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """An ordinary CPU tensor of exactly these values, dtype and shape."""
    assert type(got) is torch.Tensor, type(got)
    assert got.device.type == "cpu"
    assert not got.requires_grad
    assert (got.dtype, got.shape) == (want.dtype, want.shape), (got.dtype, got.shape, want.dtype, want.shape)
    assert torch.equal(got.float(), want.float())


def check_received(job: Job, recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list) -> None:
    same(recv_x, job.all_x[job.received])
    local = job.all_topk_idx[job.received] - job.rank * NUM_LOCAL_EXPERTS
    is_local = (local >= 0) & (local < NUM_LOCAL_EXPERTS)
    same(recv_topk_idx, torch.where(is_local, local, -1))
    same(recv_topk_weights, torch.where(is_local, job.all_topk_weights[job.received], 0.0))
    assert type(num_recv_tokens_per_expert_list) is list
    assert num_recv_tokens_per_expert_list == [int((recv_topk_idx == e).sum()) for e in range(NUM_LOCAL_EXPERTS)]


def test_throughput(job: Job, buffer: deep_ep.Buffer, num_nodes: int) -> None:
    deep_ep.Buffer.set_num_sms(24)
    config = deep_ep.Buffer.get_dispatch_config(job.num_ranks)
    previous_event = EventOverlap(EventHandle())
    num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank, event = (
        buffer.get_dispatch_layout(
            job.topk_idx,
            job.num_experts,
            previous_event=previous_event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
    )
    same(is_token_in_rank, job.in_rank)
    same(num_tokens_per_rank, job.in_rank.sum(dim=0).int())
    same(num_tokens_per_expert, (job.topk_idx.flatten()[:, None] == torch.arange(job.num_experts)).sum(dim=0).int())
    if num_nodes == 1:
        assert num_tokens_per_rdma_rank is None
    else:
        same(num_tokens_per_rdma_rank, job.in_rank.view(NUM_TOKENS, num_nodes, -1).any(dim=2).sum(dim=0).int())
    layout = {
        "num_tokens_per_rank": num_tokens_per_rank,
        "num_tokens_per_rdma_rank": num_tokens_per_rdma_rank,
        "is_token_in_rank": is_token_in_rank,
        "num_tokens_per_expert": num_tokens_per_expert,
    }

    recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, event = buffer.dispatch(
        job.x,
        **layout,
        topk_idx=job.topk_idx,
        topk_weights=job.topk_weights,
        config=config,
        previous_event=event,
        async_finish=True,
        allocate_on_comm_stream=True,
    )
    event.current_stream_wait()
    check_received(job, recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list)
    if num_nodes == 1:
        rank_prefix_matrix = handle[0]
        per_pair = torch.stack([job.per_source(destination) for destination in range(job.num_ranks)], dim=1)
        same(rank_prefix_matrix, per_pair.cumsum(dim=0).int())
    else:
        recv_gbl_rank_prefix_sum = handle[-4]
        same(recv_gbl_rank_prefix_sum, job.per_source(job.rank).cumsum(dim=0).int())

    # Cached, in the shape of a backward pass, and as a context manager around other work.
    again_x, no_topk_idx, no_topk_weights, _, handle, event = buffer.dispatch(
        job.x, handle=handle, config=config, async_finish=True, previous_event=buffer.capture()
    )
    with event:
        other_work = job.x * 2
    assert other_work.shape == job.x.shape
    same(again_x, recv_x)
    assert no_topk_idx is None
    assert no_topk_weights is None

    # Quantised rows with their scales, and a bound instead of the counts.
    x_fp8, scales = torch.ones(NUM_TOKENS, HIDDEN).to(torch.float8_e4m3fn), job.x[:, :2].float().contiguous()
    num_worst_tokens = job.num_ranks * NUM_TOKENS
    (recv_fp8, recv_scales), worst_topk_idx, _, empty_list, _, _ = buffer.dispatch(
        (x_fp8, scales),
        **layout,
        topk_idx=job.topk_idx,
        topk_weights=job.topk_weights,
        num_worst_tokens=num_worst_tokens,
    )
    num_received = len(job.received)
    assert recv_fp8.dtype is torch.float8_e4m3fn
    assert recv_fp8.shape == (num_worst_tokens, HIDDEN)
    assert bool((recv_fp8[:num_received].float() == 1).all())
    same(recv_scales[:num_received], job.all_x[job.received, :2].float())
    same(worst_topk_idx[:num_received], recv_topk_idx)
    assert bool((worst_topk_idx[num_received:] == -1).all())
    assert empty_list == []

    num_visited = job.in_rank.sum(dim=1, keepdim=True)
    bias = torch.ones_like(job.x)
    combined_x, combined_topk_weights, event = buffer.combine(
        recv_x,
        handle,
        topk_weights=recv_topk_weights,
        bias=bias,
        config=deep_ep.Buffer.get_combine_config(job.num_ranks),
        async_finish=True,
        previous_event=event,
        allocate_on_comm_stream=True,
    )
    event.current_stream_wait()
    same(combined_x, (job.x.float() * num_visited + 1).bfloat16())
    same(combined_topk_weights, torch.where(job.topk_idx >= 0, job.topk_weights, 0.0))


def test_low_latency(job: Job, buffer: deep_ep.Buffer) -> None:
    max_tokens = NUM_TOKENS + 8
    buffer.clean_low_latency_buffer(max_tokens, HIDDEN, job.num_experts)
    stats = torch.zeros(NUM_LOCAL_EXPERTS, dtype=torch.int32)
    waits = torch.zeros(job.num_ranks, dtype=torch.int64)
    first = job.rank * NUM_LOCAL_EXPERTS
    counts = torch.tensor([int((job.all_topk_idx == first + e).sum()) for e in range(NUM_LOCAL_EXPERTS)]).int()
    # Without a hook, with one, with zero copy and both quantised forms.
    for call, (use_fp8, use_hook, zero_copy, use_ue8m0) in enumerate(
        [
            (False, False, False, False),
            (False, True, True, False),
            (True, False, False, False),
            (True, True, True, True),
        ]
    ):
        recv_x, recv_count, handle, event, hook = buffer.low_latency_dispatch(
            job.x,
            job.topk_idx,
            max_tokens,
            job.num_experts,
            cumulative_local_expert_recv_stats=stats,
            dispatch_wait_recv_cost_stats=waits,
            use_fp8=use_fp8,
            round_scale=use_ue8m0,
            use_ue8m0=use_ue8m0,
            async_finish=not use_hook,
            return_recv_hook=use_hook,
        )
        hook() if use_hook else event.current_stream_wait()
        same(recv_count, counts)
        same(stats, counts * (call + 1))
        rows = dequantised(recv_x, use_ue8m0) if use_fp8 else recv_x
        assert rows.dtype is torch.bfloat16
        assert rows.shape == (NUM_LOCAL_EXPERTS, job.num_ranks * max_tokens, HIDDEN)
        src_info, layout_range, handle_max_tokens, handle_hidden, handle_experts = handle
        assert (handle_max_tokens, handle_hidden, handle_experts) == (max_tokens, HIDDEN, job.num_experts)
        assert layout_range.dtype is torch.int64
        for e in range(NUM_LOCAL_EXPERTS):
            tokens = (job.all_topk_idx == first + e).any(dim=1).nonzero()[:, 0]
            same(rows[e, : len(tokens)], job.all_x[tokens])
            same(src_info[e, : len(tokens)], (tokens % NUM_TOKENS).int())
            for source in range(job.num_ranks):
                begin, count = int(layout_range[e, source]) >> 32, int(layout_range[e, source]) & 0xFFFFFFFF
                assert (
                    src_info[e, begin : begin + count].tolist()
                    == (tokens[tokens // NUM_TOKENS == source] % NUM_TOKENS).tolist()
                )
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = rows
        out = torch.full_like(job.x, float("nan"))
        combined_x, event, hook = buffer.low_latency_combine(
            rows,
            job.topk_idx,
            job.topk_weights,
            handle,
            zero_copy=zero_copy,
            async_finish=not use_hook,
            return_recv_hook=use_hook,
            out=out,
            combine_wait_recv_cost_stats=waits,
        )
        hook() if use_hook else event.current_stream_wait()
        assert combined_x is out
        weight = torch.where(job.topk_idx >= 0, job.topk_weights, 0.0).sum(dim=1, keepdim=True)
        same(combined_x, (job.x.float() * weight).bfloat16())
    mask_status = torch.full((job.num_ranks,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(mask_status)
    same(mask_status, torch.zeros(job.num_ranks, dtype=torch.int32))


def dequantised(packed: tuple[torch.Tensor, torch.Tensor], use_ue8m0: bool) -> torch.Tensor:
    rows, scales = packed
    assert rows.dtype is torch.float8_e4m3fn
    assert scales.stride(1) == 1  # column-major, for TMA
    if use_ue8m0:
        assert scales.dtype is torch.int32
        exponents = scales.contiguous().view(torch.uint8)[..., : HIDDEN // 128]
        scales = (exponents.int() << 23).view(torch.float32)
    return (rows.float().unflatten(-1, (-1, 128)) * scales.unsqueeze(-1)).flatten(-2).bfloat16()


def main(launcher: str) -> None:
    torch.set_num_threads(1)
    if launcher == "torch":
        dist.init_process_group(
            "gloo",
            init_method=os.environ["INIT_METHOD"],
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        group, comm = dist.group.WORLD, None
    else:
        from mpi4py import MPI

        group, comm = None, MPI.COMM_WORLD

    config = deep_ep.Config(24, 8, 256)
    num_ranks = group.size() if comm is None else comm.Get_size()
    num_nvl_bytes = config.get_nvl_buffer_size_hint(HIDDEN * 2, num_ranks)
    buffer = deep_ep.Buffer(group, num_nvl_bytes, 0, explicitly_destroy=True, comm=comm)
    assert buffer.group is (comm or group)
    assert (buffer.group_size, buffer.num_nvl_bytes, buffer.explicitly_destroy) == (num_ranks, num_nvl_bytes, True)
    job = Job(buffer.rank, buffer.group_size)
    test_throughput(job, buffer, num_nodes=1)
    buffer.destroy()

    num_rdma_bytes = deep_ep.Buffer.get_low_latency_rdma_size_hint(NUM_TOKENS + 8, HIDDEN, num_ranks, job.num_experts)
    buffer = deep_ep.Buffer(
        group, 0, num_rdma_bytes, low_latency_mode=True, num_qps_per_rank=NUM_LOCAL_EXPERTS, comm=comm
    )
    test_low_latency(job, buffer)

    # Two nodes; on a real cluster the hosts say so, and not this line.
    os.environ["EPCOMM_RANKS_PER_NODE"] = str(num_ranks // 2)
    buffer = deep_ep.Buffer(group, num_nvl_bytes, num_rdma_bytes, comm=comm)
    test_throughput(job, buffer, num_nodes=2)
    if comm is None:
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.write(f"rank {job.rank} of {num_ranks}: all checks passed\n")


if __name__ == "__main__":
    main(sys.argv[1])
