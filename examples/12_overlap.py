"""Communication behind a matrix product: dispatch in the Buffer's own stream while the current one computes.

epcomm run -n 2 --mps -- python examples/12_overlap.py
CuPy's matrix product needs cuBLAS (pip install nvidia-cublas; nvidia-cublas-cu12 for CUDA 12).
"""

import sys

import cupy as cp

import epcomm
from epcomm import testing

NUM_TOKENS, HIDDEN, NUM_TOPK, NUM_LOCAL, SIZE = 4096, 4096, 8, 32, 6144

with epcomm.Buffer(num_nvl_bytes=1 << 30, backend="cuda") as buffer, cp.cuda.Stream(non_blocking=True) as stream:
    rank, num_experts, first_token = buffer.rank, NUM_LOCAL * buffer.group_size, buffer.rank * NUM_TOKENS
    x = cp.asarray(testing.token_data(NUM_TOKENS, HIDDEN, "float16", first_token=first_token))
    topk_idx = cp.asarray(testing.uniform_routing(NUM_TOKENS, num_experts, NUM_TOPK, seed=0, first_token=first_token))
    a, b, c = (cp.full((SIZE, SIZE), 1 / 64, cp.float16) for _ in range(3))
    layout = buffer.get_dispatch_layout(topk_idx, num_experts)
    first = buffer.dispatch(x, topk_idx=topk_idx, **layout.arguments())
    few_sms = epcomm.Config(num_sms=8)  # the others are for the product
    comm = buffer.get_comm_stream()

    def run(*parts):
        """Milliseconds from a common start: begin and end of each part; and what was received."""
        origin, recv = cp.cuda.Event(), None
        times = {part: (cp.cuda.Event(), cp.cuda.Event()) for part in parts}
        buffer.barrier(stream=stream)
        origin.record(stream)
        if "dispatch" in parts:
            comm.wait_event(origin)
            times["dispatch"][0].record(comm)
            recv = buffer.dispatch(x, handle=first.handle, config=few_sms, async_finish=True)
            times["dispatch"][1].record(comm)
        if "product" in parts:
            times["product"][0].record(stream)
            cp.matmul(a, b, out=c)
            times["product"][1].record(stream)
        if recv is not None:
            recv.event.current_stream_wait()  # from here on the current stream may use recv_x
        stream.synchronize()
        comm.synchronize()  # its last event is behind the dispatch
        return recv, {p: [cp.cuda.get_elapsed_time(origin, event) for event in pair] for p, pair in times.items()}

    run("dispatch", "product")  # warms up
    alone = {**run("dispatch")[1], **run("product")[1]}
    recv, together = run("dispatch", "product")
    if not (recv.recv_x == first.recv_x).all():
        sys.exit(f"rank {rank}: wrong rows")
    in_turn = sum(end - begin for begin, end in alone.values())
    at_once = max(end for _, end in together.values()) - min(begin for begin, _ in together.values())
    if rank == 0:
        for title, spans in (("alone", alone), ("at once", together)):
            for part, (begin, end) in spans.items():
                bar = " " * round(40 * begin / in_turn) + "#" * max(1, round(40 * (end - begin) / in_turn))
                print(f"{title:8s} {part:9s}{begin:7.3f} to {end:7.3f} ms  {bar}")
        begin, end = alone["dispatch"]
        print(f"hidden: {(in_turn - at_once) / (end - begin):.0%} of the dispatch; check: rows are right")
