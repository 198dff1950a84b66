"""One rank of test_process_group.py: ``python process_group_program.py SCENARIO``."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

import epcomm
from epcomm.errors import BootstrapError, InputError, PeerTimeout
from epcomm.interop.torch import ProcessGroupCommunicator

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def exchange(comm, timeout_s=None, first=0):
    """Rank s sends 3 s + d bytes to rank d, none if that is `first`; the bytes say who sends and who receives."""
    counts = np.array([[0 if 3 * s + d == first else 3 * s + d for d in range(comm.size)] for s in range(comm.size)])
    send = np.concatenate([np.full(n, 16 * comm.rank + d, np.uint8) for d, n in enumerate(counts[comm.rank])])
    send.flags.writeable = False
    want = np.concatenate([np.full(n, 16 * s + comm.rank, np.uint8) for s, n in enumerate(counts[:, comm.rank])])
    recv = np.full(want.size + 1, 255, np.uint8)
    comm.alltoallv(send, counts[comm.rank].tolist(), recv, counts[:, comm.rank].tolist(), timeout_s)
    assert recv[:-1].tolist() == want.tolist()
    assert recv[-1] == 255


def collectives(comm):
    assert comm.allgather({"rank": comm.rank, "text": "x" * 10**comm.rank}) == [
        {"rank": r, "text": "x" * 10**r} for r in range(comm.size)
    ]
    for root in range(comm.size):
        assert comm.bcast(f"from {comm.rank}", root) == f"from {root}"
    comm.barrier()
    exchange(comm)
    exchange(comm, timeout_s=30.0, first=1)


def scenario_collectives():
    comm = ProcessGroupCommunicator()
    assert isinstance(comm, epcomm.Communicator)
    assert (comm.rank, comm.size) == (RANK, SIZE)
    collectives(comm)
    backwards = comm.split(0, -RANK)
    assert (backwards.rank, backwards.size) == (SIZE - 1 - RANK, SIZE)
    assert backwards.allgather(RANK) == list(reversed(range(SIZE)))
    collectives(backwards)
    parts = [comm.split(RANK % 2, RANK) for _ in range(2)]  # the second time from memory
    for part in parts:
        assert part.allgather(RANK) == list(range(RANK % 2, SIZE, 2))
        collectives(part)


def scenario_subgroups():
    """Groups of ranks that belong to different numbers of other groups, and beside the user's own traffic."""
    if RANK == 1:
        dist.new_group([1], use_local_synchronization=True)
    groups = [dist.new_group([0, 1]), dist.new_group([1, 2])]
    for members, group in zip(([0, 1], [1, 2]), groups, strict=True):
        if RANK in members:
            pending = [dist.isend(torch.tensor([RANK]), peer, tag=1) for peer in members if peer != RANK]
            comm = ProcessGroupCommunicator(group)
            assert comm.allgather(RANK) == members
            collectives(comm)
            for peer in members:
                if peer != RANK:
                    heard = torch.tensor([-1])
                    dist.recv(heard, peer, tag=1)
                    assert heard.item() == peer
            for work in pending:
                work.wait()
        else:
            assert group is dist.GroupMember.NON_GROUP_MEMBER
            with pytest.raises(InputError, match="that this rank belongs to"):
                ProcessGroupCommunicator(group)


def scenario_timeout():
    """A rank that does not come is named; the user's group is unharmed; a new communicator works."""
    comm = ProcessGroupCommunicator()
    late = SIZE - 1
    if late != RANK:
        with pytest.raises(PeerTimeout, match="no answer from") as caught:
            exchange(comm, timeout_s=1.5)
        assert caught.value.awaited_ranks == [late]
        with pytest.raises(BootstrapError, match="make a new Buffer on all ranks"):
            comm.barrier()
    dist.barrier()
    collectives(ProcessGroupCommunicator())


def scenario_buffer():
    """Dispatch and combine when every byte goes through the communicator."""
    os.environ["EPCOMM_HOST_TRANSPORT"] = "messages"
    with epcomm.Buffer(ProcessGroupCommunicator()) as buffer:
        x = torch.full((5, 8), float(RANK + 1))
        topk_idx = torch.arange(SIZE).repeat(5, 1)
        layout = buffer.get_dispatch_layout(topk_idx, SIZE)
        result = buffer.dispatch(x, None, *layout[:2], layout.is_token_in_rank, layout[2], topk_idx)
        assert result.recv_x[:, 0].tolist() == [s + 1.0 for s in range(SIZE) for _ in range(5)]
        combined, _, _ = buffer.combine(result.recv_x, result.handle)
        assert torch.equal(combined, x * SIZE)


def scenario_abort():
    comm = ProcessGroupCommunicator()
    if RANK == 0:
        comm.abort(3)
    with pytest.raises(PeerTimeout, match="a closed connection") as caught:
        exchange(comm)
    assert caught.value.awaited_ranks == [0]
    sys.stdout.write("noticed\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=os.environ["INIT_METHOD"], rank=RANK, world_size=SIZE)
    for scenario in sys.argv[1:]:
        globals()[f"scenario_{scenario}"]()
    dist.barrier()
    dist.destroy_process_group()
