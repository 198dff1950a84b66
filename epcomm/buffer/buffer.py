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
        num_nvl_bytes: bytes of the arena within a node, the same on all ranks; `Config.get_nvl_buffer_size_hint`. On
            CUDA results of dispatch lie there for as long as they are held, and combine takes its rows from there;
            what has no room goes slower ways, counted in `stats`. The host backend needs none.
        num_rdma_bytes: bytes between nodes and for low latency, the same on all ranks;
            `get_low_latency_rdma_size_hint`. On CUDA low-latency operations need them; the host backend needs none.
        low_latency_mode: allow the low-latency operations.
        num_qps_per_rank: queue pairs to each rank of other nodes, the same on all ranks; on CUDA where NVSHMEM connects
            nodes. The first such Buffer decides how many there are, at most 127. Twice as many as SMs keep these apart;
            0 leaves it to NVSHMEM. See docs/cluster.md.
        allow_nvlink_for_low_latency_mode, allow_mnnvl: accepted as in DeepEP; without a meaning in this release.
        explicitly_destroy: the owner calls `destroy`; garbage collection does not.
        enable_shrink: a rank that does not answer a low-latency operation in time is masked instead of raising
            `PeerTimeout`; needs all ranks on one host.
        backend: "cuda", "host", or "auto": what ``EPCOMM_BACKEND`` says, and if that is "auto" too, CUDA where every
            rank has a usable GPU, and on several hosts NVSHMEM, else the host backend. All ranks agree.
        ranks_per_node: make virtual nodes of this many consecutive ranks; by default the ranks of each host form a
            node (``EPCOMM_RANKS_PER_NODE`` overrides).
        timeout_s: seconds a rank waits for its peers before `PeerTimeout`; ``EPCOMM_TIMEOUT_S`` by default. On CUDA the
            kernels' waits have this bound.
        device: on CUDA the number of this rank's device; by default the current one if that is not device 0, else one
            by local rank. Ranks may share a GPU. No meaning on the host backend.

    Raises:
        MpiMissing, WrongLauncher: the ranks cannot find each other.
        RankMismatch: the ranks passed different arguments.
        ShapeError: ranks that do not form nodes of equal size.
        UnsupportedOption: ``backend="cuda"`` where some rank cannot; says which and why.
        DeviceError: no such device, or GPUs that cannot reach each other's memory.
        CapacityError: no room for the arena on the GPU.
        CompileError, MissingDependency: kernels that cannot be compiled.
    """
