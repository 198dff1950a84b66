"""Which GPU a rank takes, and how many rows it makes room for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.calls import raises

from epcomm.backends.cuda.forecast import Forecast
from epcomm.backends.cuda.placement import Placement, choose_device, has_network
from epcomm.errors import CapacityError, DeviceError, UnsupportedOption

LOCAL_RANK_VARIABLES = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


def cupy(count: int, current: int = 0) -> SimpleNamespace:
    runtime = SimpleNamespace(getDeviceCount=lambda: count, getDevice=lambda: current)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))


def topology(rank: int, ranks: tuple[int, ...], in_process: bool = False) -> SimpleNamespace:
    return SimpleNamespace(rank=rank, same_host_ranks=ranks, in_process=in_process)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LOCAL_RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_a_device_for_each_rank():
    assert [choose_device(cupy(4), topology(rank, (0, 1, 2, 3)), None) for rank in range(4)] == [0, 1, 2, 3]
    assert [choose_device(cupy(2), topology(rank, (0, 1, 2)), None) for rank in range(3)] == [0, 1, 0]


def test_what_the_caller_says():
    assert choose_device(cupy(4), topology(1, (0, 1)), 3) == 3
    assert choose_device(cupy(4, current=2), topology(1, (0, 1)), None) == 2
    assert choose_device(cupy(4, current=0), topology(1, (0, 1), in_process=True), None) == 0
    with raises(DeviceError, "^device: got cuda:4; wanted one of the 4 devices"):
        choose_device(cupy(4), topology(0, (0,)), 4)


@pytest.mark.parametrize("name", LOCAL_RANK_VARIABLES)
def test_a_part_of_the_ranks_of_a_host(monkeypatch, name):
    """Ranks 4 to 7 of a job, in a communicator of their own, do not take the GPUs of ranks 0 to 3."""
    monkeypatch.setenv(name, "5")
    assert choose_device(cupy(8), topology(1, (0, 1, 2, 3)), None) == 5


def nodes(hosts: str, ranks_per_node: int) -> SimpleNamespace:
    """A topology; a letter for the host of each rank."""
    return SimpleNamespace(
        hosts=tuple(hosts), size=len(hosts), ranks_per_node=ranks_per_node, num_nodes=len(hosts) // ranks_per_node
    )


def test_who_needs_a_network(monkeypatch):
    monkeypatch.delenv("EPCOMM_TRANSPORT", raising=False)
    assert not has_network(nodes("aaaa", 4))
    assert not has_network(nodes("aaaa", 2))
    assert has_network(nodes("aabb", 2))
    assert has_network(nodes("aabb", 1))
    with raises(UnsupportedOption, "^ranks_per_node: got 4, with ranks 0 to 3 of one node on several hosts"):
        has_network(nodes("aabb", 4))
    with raises(UnsupportedOption, "^backend='cuda': got 33 ranks; wanted at most 32"):
        has_network(nodes("a" * 33, 1))
    monkeypatch.setenv("EPCOMM_TRANSPORT", "nvshmem")
    assert has_network(nodes("aaaa", 2))
    assert not has_network(nodes("aaaa", 4))  # one node has nobody to reach
    monkeypatch.setenv("EPCOMM_TRANSPORT", "ipc")
    assert not has_network(nodes("aaaa", 2))
    with raises(UnsupportedOption, "^EPCOMM_TRANSPORT: got ipc, on 2 hosts; wanted nvshmem"):
        has_network(nodes("aabb", 2))


def test_blocks():
    placement = Placement("gpu", num_sms=132, ranks_on_gpu=8)
    assert placement.blocks(16) == 16
    with raises(CapacityError, r"set_num_sms\(16\)"):
        placement.blocks(17)


def test_forecast():
    forecast = Forecast()
    assert forecast.rows == 0
    for num_received in (1, 100, 4095, 4096, 21_700, 1_000_000):
        forecast.note(num_received)
        assert num_received <= forecast.rows <= max(num_received + 64, num_received * 9 // 8)
        before = forecast.rows
        forecast.note(before)
        forecast.note(before // 2)
        assert forecast.rows == before  # blocks of that size serve all of these
    forecast.note(before // 2 - 1)
    assert forecast.rows < before
    forecast.note(0)
    assert forecast.rows == 0
