"""A rank of a test job works on its own GPU from the start, where there are several."""

import os

import pytest
from helpers import emulated_nvshmem
from helpers.gpu import device_of_rank
from helpers.mpi_child import JOB_VARIABLE

emulated_nvshmem.install()  # before test modules ask whether NVSHMEM is there


@pytest.fixture(autouse=True, scope="module")
def device_of_the_rank():
    """Tests have streams and arrays before they have a Buffer, which takes the same GPU."""
    if JOB_VARIABLE in os.environ:
        import cupy

        cupy.cuda.Device(device_of_rank()).use()
