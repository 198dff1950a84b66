"""The real NVSHMEM between processes on a machine without a GPU: the ranks meet, and all say what is missing."""

from __future__ import annotations

import contextlib
import ctypes
import time

import pytest
from helpers.nvrtc import needs_nvshmem

from epcomm.bootstrap import Communicator
from epcomm.errors import BootstrapError
from epcomm.jit import nvshmem_version
from epcomm.memory import driver, nvshmem_start
from epcomm.memory.nvshmem import nvshmem_group


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


pytestmark = [needs_nvshmem, pytest.mark.skipif(has_driver(), reason="there is a CUDA driver: see tests/cuda")]

# What the start must not take where nothing is to be waited for, on a loaded machine.
LIMIT_S = 60.0


@pytest.mark.ranks((1, 2, 3), isolated=True)
def test_a_start_without_a_gpu_fails_on_all_ranks(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "in_context", lambda device: contextlib.nullcontext())
    begin = time.monotonic()
    with pytest.raises(BootstrapError, match=r"^NVSHMEM \d+\.\d+\.\d+ on cuda:0: got code \d+ and status \d .*_DEBUG"):
        nvshmem_group(comm, 0, 1 << 20)
    library = nvshmem_start._library
    assert library is not None
    assert library.version() == nvshmem_version()
    assert library.has_queue_pairs == (nvshmem_version() >= (3, 5))
    if library.status() == 1:  # the ranks have met
        assert (library.my_pe(), library.num_pes()) == (comm.rank, comm.size)
    with pytest.raises(BootstrapError, match="got an earlier start that failed"):
        nvshmem_group(comm, 0, 1 << 20)
    assert time.monotonic() - begin < LIMIT_S


@pytest.mark.ranks(2)
def test_ranks_without_a_driver_do_not_start_it(comm: Communicator) -> None:
    with pytest.raises(Exception, match=r"(?i)cuda"):  # of a class of its own in each release of cuda-bindings
        nvshmem_group(comm, 0, 1 << 20)
    library = nvshmem_start._library
    assert library is not None
    assert library.status() == 0
