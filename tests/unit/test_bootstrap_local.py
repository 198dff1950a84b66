"""Ranks as threads of one process, the solo communicator, the topology, and which communicator is chosen."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from epcomm.bootstrap import (
    Communicator,
    LocalCommunicator,
    LocalGroup,
    SoloCommunicator,
    as_communicator,
    discover,
    run_local,
    topology,
)
from epcomm.bootstrap.communicator import check_segments
from epcomm.errors import BootstrapError, InputError, PeerTimeout, RankMismatch, ShapeError


def exchange(comm: Communicator, unit: int) -> None:
    """alltoallv of ``unit * source + dest`` bytes from each source to each dest, checked byte by byte."""
    send_counts = [unit * comm.rank + dest for dest in range(comm.size)]
    recv_counts = [unit * source + comm.rank for source in range(comm.size)]
    send = np.concatenate([np.full(n, 16 * comm.rank + d, np.uint8) for d, n in enumerate(send_counts)])
    want = np.concatenate([np.full(n, 16 * s + comm.rank, np.uint8) for s, n in enumerate(recv_counts)])
    recv = np.full(want.size + 3, 255, np.uint8)
    comm.alltoallv(send, send_counts, recv, recv_counts, timeout_s=30)
    np.testing.assert_array_equal(recv[: want.size], want)
    assert (recv[want.size :] == 255).all()


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_collectives_back_to_back(size):
    def program(comm):
        for i in range(100):
            assert comm.allgather((comm.rank, i)) == [(rank, i) for rank in range(size)]
            assert comm.bcast([comm.rank, i], root=i % size) == [i % size, i]
            comm.barrier()
        for unit in (0, 1, 50):
            exchange(comm, unit)
        return comm.rank

    assert run_local(size, program) == list(range(size))


def test_alltoallv_leaves_send_reusable_at_once():
    def program(comm):
        send, recv = np.zeros(4, np.uint8), np.zeros(4, np.uint8)
        for i in range(200):
            send[:] = (i + comm.rank) % 251
            comm.alltoallv(send, [1] * 4, recv, [1] * 4)
            send[:] = 255
            assert recv.tolist() == [(i + source) % 251 for source in range(4)]

    run_local(4, program)


def test_split_by_color_ordered_by_key():
    def program(comm):
        half = comm.split(comm.rank % 2, -comm.rank)
        assert half.allgather(comm.rank) == ([4, 2, 0] if comm.rank % 2 == 0 else [3, 1])
        exchange(half, 3)
        alone = half.split(half.rank, 0)
        assert (alone.rank, alone.size) == (0, 1)
        return half.rank

    assert run_local(5, program) == [2, 1, 1, 0, 0]


def test_split_with_a_negative_color_raises_on_every_rank():
    def program(comm):
        with pytest.raises(InputError, match=r"colors \[0, -1\]"):
            comm.split(-comm.rank, 0)
        comm.barrier()

    run_local(2, program)


def test_first_error_is_raised_and_names_the_rank():
    blocked = []

    def program(comm):
        sub = comm.split(0, 0)
        if comm.rank == 1:
            raise KeyError("mine")
        try:
            sub.barrier()
        except BootstrapError as error:
            blocked.append((comm.rank, repr(error.__cause__)))
            raise

    with pytest.raises(KeyError, match="mine") as caught:
        run_local(3, program)
    assert caught.value.__notes__ == ["raised on rank 1 of 3 (run_local)"]
    assert sorted(blocked) == [(0, "KeyError('mine')"), (2, "KeyError('mine')")]


def test_system_exit_of_a_rank_is_not_lost():
    def program(comm):
        if comm.rank == 0:
            sys.exit(3)
        comm.barrier()

    with pytest.raises(SystemExit):
        run_local(2, program)


def test_abort_raises_on_all_ranks():
    def program(comm):
        if comm.rank == 1:
            comm.abort(7)
        comm.barrier()

    with pytest.raises(BootstrapError, match=r"abort\(7\) on rank 1"):
        run_local(2, program)


def test_hang_names_the_ranks_and_shows_where_they_are():
    release = threading.Event()

    def stuck_here(comm):
        if comm.rank != 1:
            release.wait(60)

    with pytest.raises(TimeoutError, match=r"ranks \[0, 2\] of 3") as caught:
        run_local(3, stuck_here, timeout_s=0.2)
    release.set()
    assert all("stuck_here" in note for note in caught.value.__notes__)


def test_different_calls_are_an_error_not_a_mixup():
    def program(comm):
        if comm.rank == 0:
            comm.allgather(1)
        else:
            comm.barrier()

    with pytest.raises(BootstrapError, match="the same call on every rank"):
        run_local(2, program)


def test_alltoallv_timeout_names_the_absent_ranks_and_breaks_the_group():
    may_go = threading.Event()

    def program(comm):
        one = np.zeros(3, np.uint8)
        if comm.rank == 0:
            with pytest.raises(PeerTimeout) as caught:
                comm.alltoallv(one, [1] * 3, one.copy(), [1] * 3, timeout_s=0.1)
            assert caught.value.awaited_ranks == [1, 2]
            may_go.set()
            return
        assert may_go.wait(30)
        with pytest.raises(BootstrapError) as late:
            comm.barrier()
        assert isinstance(late.value.__cause__, PeerTimeout)

    run_local(3, program)


def test_alltoallv_with_counts_that_disagree_raises_and_does_not_hang():
    def program(comm):
        data = np.zeros(4, np.uint8)
        recv_counts = [1, 2] if comm.rank == 0 else [1, 1]
        comm.alltoallv(data, [1, 1], data.copy(), recv_counts)

    with pytest.raises(BootstrapError, match=r"got \[1, 1\] bytes from the ranks; wanted \[1, 2\]"):
        run_local(2, program)


@pytest.mark.parametrize(
    ("array", "counts"),
    [
        (np.zeros(4, np.int8), [2, 2]),
        (np.zeros((2, 2), np.uint8), [2, 2]),
        (np.zeros(8, np.uint8)[::2], [2, 2]),
        (np.zeros(4, np.uint8), [4]),
        (np.zeros(4, np.uint8), [5, -1]),
        (np.zeros(4, np.uint8), [2, 3]),
    ],
    ids=["int8", "2d", "strided", "one_count_missing", "negative", "too_many_bytes"],
)
def test_bad_segments(array, counts):
    with pytest.raises(InputError):
        check_segments("send", array, counts, 2)


def test_shared_registry_is_common_to_the_ranks():
    def program(comm):
        with comm.group.lock:
            comm.group.shared[comm.rank] = 10 * comm.rank
        comm.barrier()
        return dict(comm.group.shared)

    assert run_local(3, program) == [{0: 0, 1: 10, 2: 20}] * 3


def test_group_of_no_ranks():
    with pytest.raises(InputError, match="at least one rank"):
        LocalGroup(0)


def test_solo_communicator():
    comm = SoloCommunicator()
    assert isinstance(comm, Communicator)
    assert (comm.rank, comm.size, comm.allgather("a"), comm.bcast("b")) == (0, 1, ["a"], "b")
    exchange(comm.split(0, 0), 5)
    with pytest.raises(InputError):
        comm.bcast(1, root=1)
    with pytest.raises(InputError):
        comm.alltoallv(np.zeros(2, np.uint8), [2], np.zeros(2, np.uint8), [1])
    with pytest.raises(SystemExit) as caught:
        comm.abort(4)
    assert caught.value.code == 4


def test_as_communicator_takes_the_protocol_and_nothing_else():
    comm = LocalGroup(2).comms[1]
    assert as_communicator(comm) is comm
    with pytest.raises(InputError, match="got an object of type int"):
        as_communicator(3)


def run_python(program: str, **changes: str) -> str:
    from epcomm import env

    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env.child_environment({"PYTHONPATH": ":".join(sys.path), **changes}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TELL = """
from epcomm.bootstrap import as_communicator
try:
    print(as_communicator())
except Exception as error:
    print(type(error).__name__, error)
"""


def test_import_does_not_load_mpi():
    program = "import sys, epcomm.bootstrap; print({'mpi4py', 'mpi4py.MPI'} & set(sys.modules))"
    assert run_python(program) == "set()\n"


def test_without_mpi_one_rank_works_and_several_are_told_what_to_install():
    no_mpi = {"MPI4PY_MPIABI": "mpich", "MPI4PY_LIBMPI": "/nonexistent/libmpi.so"}
    assert run_python(TELL, **no_mpi) == "SoloCommunicator()\n"
    told = run_python(TELL, **no_mpi, OMPI_COMM_WORLD_SIZE="4")
    assert told.startswith("MpiMissing MPI: got a launcher that started 4 ranks")
    assert "pip install 'epcomm[mpi]'" in told


def test_wrong_launcher_is_found_by_the_number_of_ranks_it_started():
    told = run_python(TELL, OMPI_COMM_WORLD_SIZE="4")
    assert told.startswith("WrongLauncher MPI: got a world of one rank from a launcher that started 4")
    assert "mpirun" in told


def test_calls_from_another_thread_need_mpi_thread_support():
    program = """
import threading, mpi4py
mpi4py.rc.thread_level = "funneled"
from epcomm.bootstrap import as_communicator
comm = as_communicator()
comm.barrier()
def other():
    try:
        comm.barrier()
    except Exception as error:
        print(type(error).__name__, error)
thread = threading.Thread(target=other)
thread.start()
thread.join()
"""
    assert "mpi4py.rc.thread_level = 'multiple'" in run_python(program)


def topology_of(hosts: str, monkeypatch: pytest.MonkeyPatch, ranks_per_node: object = None) -> list[topology.Topology]:
    """The topology found by ranks on hosts named by the letters of `hosts`; `ranks_per_node` may be a function."""
    names = {f"rank {rank}": f"host-{letter}" for rank, letter in enumerate(hosts)}
    monkeypatch.setattr(topology, "host_identity", lambda: names[threading.current_thread().name])

    def program(comm):
        return discover(comm, ranks_per_node(comm.rank) if callable(ranks_per_node) else ranks_per_node)

    return run_local(len(hosts), program)


def test_topology_of_one_host_is_one_node(monkeypatch):
    found = topology_of("aaa", monkeypatch)[2]
    assert (found.rank, found.size, found.ranks_per_node, found.num_nodes) == (2, 3, 3, 1)
    assert (found.node, found.local_rank, found.in_process) == (0, 2, True)
    assert found.same_host_ranks == (0, 1, 2)


def test_topology_follows_the_hosts(monkeypatch):
    found = topology_of("aabb", monkeypatch)
    assert [(t.node, t.local_rank) for t in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found[3].same_host_ranks == (2, 3)
    assert found[0].hosts == ("host-a", "host-a", "host-b", "host-b")


@pytest.mark.parametrize("hosts", ["aab", "abab", "abba"])
def test_unequal_or_scattered_hosts_need_ranks_per_node(hosts, monkeypatch):
    with pytest.raises(ShapeError, match="pass ranks_per_node="):
        topology_of(hosts, monkeypatch)
    assert topology_of(hosts, monkeypatch, 1)[1].num_nodes == len(hosts)


def test_virtual_nodes(monkeypatch):
    assert [t.node for t in topology_of("aaaaaa", monkeypatch, 2)] == [0, 0, 1, 1, 2, 2]
    monkeypatch.setenv("EPCOMM_RANKS_PER_NODE", "3")
    assert [t.local_rank for t in topology_of("aaaaaa", monkeypatch)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("value", [0, -1, 4])
def test_ranks_per_node_must_divide_the_ranks(value, monkeypatch):
    with pytest.raises(ShapeError, match="a divisor of the number of ranks, 6"):
        topology_of("aaaaaa", monkeypatch, value)


def test_ranks_per_node_must_agree(monkeypatch):
    with pytest.raises(RankMismatch) as caught:
        topology_of("aa", monkeypatch, lambda rank: rank + 1)
    assert caught.value.table == {"ranks_per_node": [1, 2]}


def test_host_identity_is_stable_and_names_the_host():
    import socket

    assert topology.host_identity() == topology.host_identity()
    assert topology.host_identity().startswith(socket.gethostname() + "/")


def test_local_communicator_has_the_protocol():
    assert isinstance(LocalGroup(1).comms[0], Communicator)
    assert isinstance(LocalGroup(1).comms[0], LocalCommunicator)
