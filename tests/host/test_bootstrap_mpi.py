"""The MPI adapter on 1 to 4 ranks: collectives, the one cached duplicate, timeouts, and what ends a job."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from epcomm.bootstrap import Communicator, as_communicator, discover, launcher
from epcomm.errors import BootstrapError, InputError, PeerTimeout, RankMismatch

ALL_SIZES = (1, 2, 3, 4)
NUM_MANY = 3000  # MPICH has room for 2046 communicators


def exchange(comm: Communicator, unit: int) -> None:
    """alltoallv of ``unit * source + dest`` bytes from each source to each dest, checked byte by byte."""
    send_counts = [unit * comm.rank + dest for dest in range(comm.size)]
    recv_counts = [unit * source + comm.rank for source in range(comm.size)]
    send = np.concatenate([np.full(n, 16 * comm.rank + d, np.uint8) for d, n in enumerate(send_counts)])
    want = np.concatenate([np.full(n, 16 * s + comm.rank, np.uint8) for s, n in enumerate(recv_counts)])
    recv = np.full(want.size + 3, 255, np.uint8)
    comm.alltoallv(send, send_counts, recv, recv_counts, timeout_s=60)
    np.testing.assert_array_equal(recv[: want.size], want)
    assert (recv[want.size :] == 255).all()


@pytest.mark.ranks(ALL_SIZES, slow=(1, 3, 4))
def test_collectives(comm, num_ranks):
    assert isinstance(comm, Communicator)
    assert comm.size == num_ranks
    for i in range(20):
        assert comm.allgather((comm.rank, i)) == [(rank, i) for rank in range(num_ranks)]
        assert comm.bcast({"from": comm.rank}, root=i % num_ranks) == {"from": i % num_ranks}
        comm.barrier()
        exchange(comm, 1000 * (i % 3))
    with pytest.raises(InputError):
        comm.bcast(1, root=num_ranks)


@pytest.mark.ranks(ALL_SIZES, slow=(1, 3, 4))
def test_long_segments_travel_in_pieces(comm, monkeypatch):
    from epcomm.bootstrap import mpi

    for chunk_bytes in (1, 7, 64):
        monkeypatch.setattr(mpi, "CHUNK_BYTES", chunk_bytes)
        exchange(comm, 64)
        exchange(comm, 0)


@pytest.mark.ranks(ALL_SIZES, slow=(1, 3, 4))
def test_topology(comm, num_ranks):
    found = discover(comm)
    assert (found.ranks_per_node, found.num_nodes, found.local_rank) == (num_ranks, 1, comm.rank)
    assert found.same_host_ranks == tuple(range(num_ranks))
    assert not found.in_process
    assert discover(comm, 1).node == comm.rank
    if num_ranks > 1:
        with pytest.raises(RankMismatch):
            discover(comm, 1 + comm.rank % 2)


@pytest.mark.ranks((1, 4), slow=(1, 4))
def test_split_is_made_once_for_equal_arguments(comm):
    half = comm.split(comm.rank % 2, -comm.rank)
    members = [rank for rank in reversed(range(comm.size)) if rank % 2 == comm.rank % 2]
    assert half.allgather(comm.rank) == members
    exchange(half, 9)
    assert comm.split(comm.rank % 2, -comm.rank) is half
    assert comm.split(1 + comm.rank % 2, 0) is not half
    for _ in range(NUM_MANY // comm.size):
        assert comm.split(comm.rank % 2, -comm.rank) is half
    with pytest.raises(InputError, match="colors >= 0"):
        comm.split(-1 if comm.rank == 0 else 0, 0)
    comm.barrier()


@pytest.mark.ranks(2)
def test_one_duplicate_for_each_user_communicator(comm):
    from mpi4py import MPI

    class Wrapped(MPI.Intracomm):
        """A second Python object for the same MPI handle."""

    user = MPI.COMM_WORLD.Dup()
    first = as_communicator(user)
    assert first is not comm
    assert all(as_communicator(Wrapped(user)) is first for _ in range(NUM_MANY))
    assert as_communicator(first) is first
    assert as_communicator(MPI.COMM_WORLD) is comm
    user.Free()
    with pytest.raises(BootstrapError, match="one that was freed"):
        first.barrier()


@pytest.mark.ranks(2)
def test_duplicates_are_freed_with_the_users_communicators(comm):
    from mpi4py import MPI

    for i in range(NUM_MANY):
        user = MPI.COMM_WORLD.Dup()
        ours = as_communicator(user)
        if i % 500 == 0:
            exchange(ours.split(0, 0), 10)
        user.Free()


@pytest.mark.ranks(2)
def test_our_messages_do_not_meet_the_users(comm):
    from mpi4py import MPI

    from epcomm.bootstrap import mpi

    peer = 1 - comm.rank
    received = np.zeros(8, np.uint8)
    # The user's own message is under way, with the tag that epcomm uses, before and after an exchange of ours.
    receive = MPI.COMM_WORLD.Irecv(received, peer, mpi._TAG)
    exchange(comm, 100)
    MPI.COMM_WORLD.Send(np.full(8, 77, np.uint8), peer, mpi._TAG)
    receive.Wait()
    assert (received == 77).all()


@pytest.mark.ranks(2)
def test_what_is_no_communicator(comm):
    from mpi4py import MPI

    with pytest.raises(InputError, match="COMM_NULL"):
        as_communicator(MPI.COMM_NULL)
    inter = MPI.COMM_SELF.Create_intercomm(0, MPI.COMM_WORLD, 1 - comm.rank)
    with pytest.raises(InputError, match="an intercommunicator"):
        as_communicator(inter)
    inter.Free()
    assert as_communicator(MPI.COMM_SELF).size == 1


@pytest.mark.slow
@pytest.mark.ranks(3)
def test_timeout_names_the_late_ranks_and_the_next_adapter_is_fresh(comm):
    from mpi4py import MPI

    user = MPI.COMM_WORLD.Dup()
    ours = as_communicator(user)
    num_bytes = 1 << 20  # more than MPI sends without an answer
    if comm.rank == 0:
        send, recv = np.zeros(3 * num_bytes, np.uint8), np.zeros(3 * num_bytes, np.uint8)
        with pytest.raises(PeerTimeout) as caught:
            ours.alltoallv(send, [num_bytes] * 3, recv, [num_bytes] * 3, timeout_s=0.1)
        assert (caught.value.waiting_rank, caught.value.awaited_ranks) == (0, [1, 2])
        with pytest.raises(BootstrapError, match="an earlier exchange that failed") as later:
            ours.barrier()
        assert later.value.__cause__ is caught.value
    # Ranks 1 and 2 know nothing of it, but learn of it here: all make a new duplicate.
    fresh = as_communicator(user)
    assert fresh is not ours
    exchange(fresh, 1000)
    with pytest.raises(BootstrapError):
        ours.barrier()
    assert as_communicator(user) is fresh
    user.Free()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("promised", [[4, 4], [1, 1], [0, 0]], ids=["too_few_sent", "too_many_sent", "none_expected"])
def test_counts_that_disagree_raise(comm, promised):
    from mpi4py import MPI

    user = MPI.COMM_WORLD.Dup()
    ours = as_communicator(user)
    with pytest.raises(BootstrapError, match="recv_counts equal to what the peers send"):
        ours.alltoallv(np.zeros(4, np.uint8), [2, 2], np.zeros(8, np.uint8), promised, timeout_s=30)
    exchange(as_communicator(user), 5)
    user.Free()


DIE = """
import os, sys, signal
from epcomm.bootstrap import as_communicator, install_abort_hook
comm = as_communicator()
if {hook}:
    assert install_abort_hook(comm)
comm.barrier()
if comm.rank == 1:
    {act}
comm.barrier()
"""
RAISE, EXIT, KILL = "raise RuntimeError('the reason')", "sys.exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("act", "statuses", "text"),
    # How a killed rank shows in mpirun's own status: MPICH, Open MPI, Intel MPI.
    [(RAISE, {1}, "RuntimeError: the reason"), (EXIT, {3}, ""), (KILL, {9, 137, 255}, "")],
    ids=["raises", "exits", "is_killed"],
)
def test_a_dead_rank_ends_a_job_of_epcomm_run(act, statuses, text, tmp_path, capfd):
    from epcomm import cli

    script = tmp_path / "die.py"
    script.write_text(DIE.format(hook=False, act=act))
    returncode = cli.main(["run", "-n", "3", "--timeout", "60", "--", sys.executable, str(script)])
    output = "".join(capfd.readouterr())
    assert returncode in statuses, output
    assert text in output


@pytest.mark.slow
def test_the_abort_hook_ends_a_job_of_plain_python(run_ranks):
    returncode, output = run_ranks(3, [sys.executable, "-c", DIE.format(hook=True, act=RAISE)])
    assert returncode == 1
    assert "RuntimeError: the reason" in output


@pytest.mark.slow
def test_a_job_ends_normally_after_a_timeout_that_was_handled(run_ranks):
    """MPI_Finalize does not wait for the messages that nobody took."""
    program = """
import numpy as np
from epcomm.bootstrap import as_communicator
comm = as_communicator()
data = np.zeros(2 << 20, np.uint8)
if comm.rank == 0:
    try:
        comm.alltoallv(data, [1 << 20] * 2, data.copy(), [1 << 20] * 2, timeout_s=0.1)
    except TimeoutError as error:
        print("caught", error.awaited_ranks)
"""
    assert run_ranks(2, [sys.executable, "-c", program]) == (0, "caught [1]\n")


def test_mpirun_of_this_environment_is_known():
    assert launcher.find_mpirun().kind in {"mpich", "openmpi", "intel"}
