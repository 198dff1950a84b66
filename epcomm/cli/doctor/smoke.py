"""The two-rank program of the doctor: one dispatch and one combine, compared bit by bit with the reference.

Started by `epcomm.cli.doctor.mpi.run_smoke` as ``mpirun -n 2 python -m mpi4py ... BACKEND``. Rows and routing
are functions of the global token index, so every rank knows what all ranks sent.
"""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np

import epcomm
from epcomm import reference, testing
from epcomm.bootstrap import as_communicator
from epcomm.cli.demo.arrays import arrays_of
from epcomm.cli.doctor.mpi import SMOKE_LINE

__all__ = ["main", "round_trip"]

_NUM_TOKENS, _HIDDEN, _NUM_TOPK, _EXPERTS_PER_RANK = 16, 256, 2, 4
_ARENA_BYTES = 4 << 20


def main() -> int:
    """Runs the round trip and prints one line about it; an exception goes on, so that the launcher ends the job."""
    try:
        line = round_trip(*sys.argv[1:2])
    except Exception as error:
        _say(f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    if line:
        _say(line)
    return 0


def _say(line: str) -> None:
    # One write, newline included: print makes two of them, and the other rank's line could come between.
    sys.stdout.write(f"{SMOKE_LINE}{line}\n")
    sys.stdout.flush()


def round_trip(backend: str = "host") -> str:
    """Dispatches and combines with `backend`. Collective over the MPI world.

    Returns:
        On rank 0 what was checked, on the other ranks an empty string.

    Raises:
        AssertionError: a result differs from the reference in some bit.
    """
    comm = as_communicator(None)
    rank, num_ranks = comm.rank, comm.size
    if num_ranks != 2:
        raise RuntimeError(f"the launcher made a world of {num_ranks} ranks instead of 2")
    num_experts = _EXPERTS_PER_RANK * num_ranks
    firsts = [source * _NUM_TOKENS for source in range(num_ranks)]
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    x = [testing.token_data(_NUM_TOKENS, _HIDDEN, bfloat16, first_token=first) for first in firsts]
    topk_idx = [
        testing.uniform_routing(_NUM_TOKENS, num_experts, _NUM_TOPK, seed=0, first_token=first) for first in firsts
    ]
    weights = [np.full((_NUM_TOKENS, _NUM_TOPK), 1 / _NUM_TOPK, np.float32) for _ in firsts]

    arrays = arrays_of(backend)
    with epcomm.Buffer(comm, _ARENA_BYTES, backend=backend) as buffer:
        indices = arrays.put(topk_idx[rank])
        layout = buffer.get_dispatch_layout(indices, num_experts)
        recv_x, recv_topk_idx, recv_weights, per_local_expert, handle, _ = buffer.dispatch(
            arrays.put(x[rank]), topk_idx=indices, topk_weights=arrays.put(weights[rank]), **layout.arguments()
        )
        combined_x, _, _ = buffer.combine(recv_x, handle)

        dispatched = reference.dispatch(x, topk_idx, num_experts, topk_weights=weights)
        want = dispatched[rank]
        testing.assert_bitwise(arrays.get(recv_x), want.recv_x, "dispatch, rows")
        testing.assert_bitwise(arrays.get(recv_topk_idx), want.recv_topk_idx, "dispatch, expert indices")
        testing.assert_bitwise(arrays.get(recv_weights), want.recv_topk_weights, "dispatch, weights")
        testing.assert_bitwise(
            np.array(per_local_expert), np.array(want.num_recv_tokens_per_expert_list), "dispatch, tokens per expert"
        )
        combined = reference.combine([result.recv_x for result in dispatched], topk_idx, num_experts)
        testing.assert_bitwise(arrays.get(combined_x), combined[rank][0], "combine, rows")
    comm.barrier()  # no word of success before both ranks have compared
    if rank:
        return ""
    where = f" ({arrays.machine})" if backend == "cuda" else ""
    return f"2 ranks dispatched and combined {_NUM_TOKENS} rows of {_HIDDEN} bfloat16 each, bitwise right{where}"


if __name__ == "__main__":
    sys.exit(main())
