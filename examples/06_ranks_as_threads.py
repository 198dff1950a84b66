"""Ranks as threads of one process: the same program without MPI, for notebooks, tests and debuggers.

python examples/06_ranks_as_threads.py
"""

import sys

import numpy as np

import epcomm

NUM_RANKS, NUM_TOKENS, HIDDEN = 4, 4, 32


def program(comm):
    """What one rank does. With mpirun it would be epcomm.Buffer(MPI.COMM_WORLD), and nothing else would change."""
    with epcomm.Buffer(comm) as buffer:
        x = np.full((NUM_TOKENS, HIDDEN), 100 * buffer.rank, np.float32) + np.arange(NUM_TOKENS)[:, None]
        x = x.astype(np.float32)
        # One expert a rank; token t of every rank goes to rank t.
        topk_idx = np.arange(NUM_TOKENS)[:, None]
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, NUM_RANKS)
        recv = buffer.dispatch(x, None, per_rank, per_node, in_rank, per_expert, topk_idx)
        out = buffer.combine(-recv.recv_x, recv.handle).combined_x
        if not np.array_equal(out, -x):
            raise ValueError("the rows did not come back")
        return recv.recv_x[:, 0].astype(int).tolist()


received = epcomm.run_local(NUM_RANKS, program)
for rank, tokens in enumerate(received):
    print(f"rank {rank} received {tokens}")
if received != [[100 * source + rank for source in range(NUM_RANKS)] for rank in range(NUM_RANKS)]:
    sys.exit("wrong rows")

# An error on one rank ends the run, and says where it was.
try:
    epcomm.run_local(NUM_RANKS, lambda comm: program(comm) if comm.rank else 1 / 0)
    sys.exit("an error on rank 0 went unnoticed")
except ZeroDivisionError as error:
    print(f"check: rows are right; errors are passed on: {error} ({error.__notes__[0]})")
