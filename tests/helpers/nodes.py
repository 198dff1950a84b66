"""Tests of one node, again on several."""

from __future__ import annotations

import pytest
from helpers.nvrtc import needs_nvshmem

from epcomm import env


@pytest.fixture(scope="module", autouse=True, params=["one_node", pytest.param("network", marks=needs_nvshmem)])
def nodes(request):
    """For a whole module that imports it: all ranks on one node, then nodes that reach each other through NVSHMEM."""
    num_ranks = env.launcher_size()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "network":
            patch.setenv("EPCOMM_TRANSPORT", "nvshmem")
            patch.setenv("EPCOMM_RANKS_PER_NODE", "2" if num_ranks % 2 == 0 and num_ranks > 2 else "1")
        yield request.param
