"""Makes `tests/helpers` importable as ``helpers``, and runs ``@pytest.mark.ranks`` tests on MPI ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
# Every rank of every job imports its test file: without the cached bytecode that some images switch off, pytest would
# rewrite the file's assertions again in each of them.
sys.dont_write_bytecode = False

from helpers import mpi_child, mpi_jobs  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    mpi_jobs.register(config)


@pytest.fixture(autouse=True, scope="module")
def backend_of_the_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests outside of tests/cuda take the host backend where there is a GPU, too; so do the programs they start."""
    with pytest.MonkeyPatch.context() as patch:
        if "cuda" not in request.path.parts[-2:]:
            patch.setenv("EPCOMM_BACKEND", "host")
        yield


comm = mpi_child.comm
num_ranks = mpi_child.num_ranks
run_ranks = mpi_jobs.run_ranks
