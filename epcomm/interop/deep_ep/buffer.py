"""`Buffer` with the constructor of DeepEP V1."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

import epcomm.buffer
from epcomm.errors import InputError
from epcomm.interop.process_group import ProcessGroupCommunicator

__all__ = ["Buffer"]


class Buffer(epcomm.buffer.Buffer):
    """`epcomm.Buffer` over a process group. Construction is collective and blocks the host.

    Args:
        group: a torch.distributed process group of any backend. Whatever `epcomm.Buffer` takes as `comm` is fine, too.
        comm: an mpi4py communicator, instead of `group`.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode, num_qps_per_rank, allow_nvlink_for_low_latency_mode,
            allow_mnnvl, explicitly_destroy, enable_shrink: as in `epcomm.Buffer`.

    Attributes:
        group: `group`, or else `comm`.

    Raises:
        InputError: both or none of `group` and `comm`.
        Others as `epcomm.Buffer`.
    """

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        if (group is None) == (comm is None):
            raise InputError(
                "Buffer",
                got="neither group nor comm" if group is None else "both group and comm",
                wanted="one of them",
                do="pass group=torch.distributed.group.WORLD, or comm=MPI.COMM_WORLD",
            )
        self.group = comm if group is None else group
        is_process_group = dist.is_available() and isinstance(group, dist.ProcessGroup)
        super().__init__(
            ProcessGroupCommunicator(group) if is_process_group else self.group,
            num_nvl_bytes,
            num_rdma_bytes,
            low_latency_mode,
            num_qps_per_rank,
            allow_nvlink_for_low_latency_mode,
            allow_mnnvl,
            explicitly_destroy,
            enable_shrink,
        )
        self.explicitly_destroy, self.enable_shrink = explicitly_destroy, enable_shrink
