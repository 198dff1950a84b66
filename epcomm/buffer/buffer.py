"""The Buffer class."""

from __future__ import annotations

from epcomm.buffer.low_latency import LowLatencyOperations
from epcomm.buffer.throughput import ThroughputOperations

__all__ = ["Buffer"]


class Buffer(ThroughputOperations, LowLatencyOperations):
    """Expert-parallel dispatch and combine between the ranks of a communicator.

    The interface of DeepEP V1's ``Buffer``, for arrays of NumPy, PyTorch, JAX, CuPy and every other DLPack producer;
    results come in the framework of the input, without a copy. Construction is collective and blocks the host. One
    thread at a time may be inside a Buffer; several Buffers may be used at once.

    Args:
        comm: an mpi4py communicator, an object with the methods of `epcomm.Communicator`, or None for all ranks of
            the job (this process alone where there is no MPI).
        num_nvl_bytes: bytes of the arena within a node; `Config.get_nvl_buffer_size_hint`. The host backend
            needs none.
        num_rdma_bytes: bytes between nodes and for low latency; `get_low_latency_rdma_size_hint`. The host backend
            needs none.
        low_latency_mode: allow the low-latency operations.
        num_qps_per_rank: queue pairs of RDMA connections; no meaning on the host backend.
        allow_nvlink_for_low_latency_mode, allow_mnnvl: accepted as in DeepEP; no meaning on the host backend.
        explicitly_destroy: the owner calls `destroy`; garbage collection does not.
        enable_shrink: a rank that does not answer a low-latency operation in time is masked instead of raising
            `PeerTimeout`; needs all ranks on one host.
        backend: "host", or "auto": the host backend, the only one of this release.
        ranks_per_node: make virtual nodes of this many consecutive ranks; by default the ranks of each host form a
            node (``EPCOMM_RANKS_PER_NODE`` overrides).
        timeout_s: seconds a rank waits for its peers before `PeerTimeout`; ``EPCOMM_TIMEOUT_S`` by default.

    Raises:
        MpiMissing, WrongLauncher: the ranks cannot find each other.
        RankMismatch: the ranks passed different arguments.
        ShapeError: ranks that do not form nodes of equal size.
        UnsupportedOption: ``backend="cuda"``.
    """
