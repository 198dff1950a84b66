"""A rank of a test job works on its own GPU from the start, where there are several."""

import os

import pytest
from helpers.mpi_child import JOB_VARIABLE

from epcomm import env


@pytest.fixture(autouse=True, scope="module")
def device_of_the_rank():
    """Tests have streams and arrays before they have a Buffer, which takes the same GPU."""
    number = env.launcher_local_rank()
    if JOB_VARIABLE in os.environ and number is not None:
        import cupy

        cupy.cuda.Device(number % cupy.cuda.runtime.getDeviceCount()).use()
