"""What rows do between GPUs if nothing else happens: they arrive, and are counted only if they do."""

from __future__ import annotations

import pytest
from helpers.gpu import need_gpu

from epcomm.bootstrap import as_communicator
from epcomm.cli.bench.cuda import link_speed
from epcomm.errors import BootstrapError
from epcomm.kernels import link_probe

cupy = need_gpu()


@pytest.fixture
def few_bytes(monkeypatch):
    monkeypatch.setattr(link_speed, "_PEER_BYTES", 1 << 18)


@pytest.mark.gpu
@pytest.mark.ranks((2, 3, 5))
@pytest.mark.parametrize("row_bytes", [28672, 14336, 64, 48])
def test_rows_arrive(few_bytes, row_bytes):
    comm, stream = as_communicator(None), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device(comm.rank % cupy.cuda.runtime.getDeviceCount()).use()
    speeds = link_speed.row_speeds(cupy, comm, stream, 3, row_bytes, 7168)
    assert min(speeds) > 0
    assert comm.allgather(speeds) == [speeds] * comm.size


@pytest.mark.gpu
@pytest.mark.ranks(3)
def test_rows_that_go_elsewhere_are_noticed(few_bytes, monkeypatch):
    comm, stream = as_communicator(None), cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device(comm.rank % cupy.cuda.runtime.getDeviceCount()).use()
    peers_of = link_probe.peers_of

    def others(rank, num_ranks, num_rows):
        peers = peers_of(rank, num_ranks, num_rows)
        peers[num_rows // 2] = 0 + 1 + 2 - rank - peers[num_rows // 2]
        return peers

    monkeypatch.setattr(link_probe, "peers_of", others)
    with pytest.raises(BootstrapError, match="rows of the wrong ranks"):
        link_speed.row_speeds(cupy, comm, stream, 3, 512, 512)
