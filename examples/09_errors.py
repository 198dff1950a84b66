"""What a mistake on one rank looks like: an exception in that same call on all ranks, and a Buffer that goes on.

epcomm run -n 4 -- python examples/09_errors.py
"""

import sys

import numpy as np

import epcomm
from epcomm import errors

NUM_TOKENS, HIDDEN = 8, 32

with epcomm.Buffer() as buffer:
    rank, last = buffer.rank, buffer.group_size - 1
    x = np.full((NUM_TOKENS, HIDDEN), rank, np.float32)
    topk_idx = (rank + np.arange(NUM_TOKENS)[:, None]) % buffer.group_size
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, buffer.group_size)
    layout = (per_rank, per_node, in_rank, per_expert)

    def message_of(expected, x):
        """The message of the error that a dispatch of `x` must raise on this rank."""
        try:
            buffer.dispatch(x, None, *layout, topk_idx)
        except expected as error:
            return f"{type(error).__name__}: {error}"
        sys.exit(f"rank {rank}: no {expected.__name__}")

    # The last rank passes a dtype that dispatch does not take. It gets the error, and the others hear of it.
    if rank == last:
        message = message_of(errors.DtypeError, x.astype(np.float64))
    else:
        message = message_of(errors.PeerError, x)
        if f"rank {last}" not in message:
            sys.exit(f"rank {rank}: the message does not name the rank: {message}")
    if rank in (0, last):
        print(f"rank {rank}: {message}", flush=True)

    # Rows of different lengths: nobody is wrong alone, so all ranks get the table.
    if buffer.group_size > 1:
        message = message_of(errors.RankMismatch, x if rank else x[:, : HIDDEN // 2].copy())
        if rank == 0:
            print(f"rank 0: {message}", flush=True)

    # Nothing was sent; the Buffer is in step and works.
    recv = buffer.dispatch(x, None, *layout, topk_idx)
    if not np.array_equal(buffer.combine(recv.recv_x, recv.handle).combined_x, x):
        sys.exit(f"rank {rank}: wrong sums after the errors")
    if rank == 0:
        print("check: every rank raised, and the Buffer still works")
