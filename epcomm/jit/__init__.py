"""From CUDA source text to loaded kernels. Knows nothing of MoE."""

from epcomm.jit.compiler import Program, installed_nvshmem, nvshmem_version
from epcomm.jit.device import current_device, device_architecture, device_uuid, load_cupy, max_shared_bytes, num_sms
from epcomm.jit.kernel import Kernel
from epcomm.jit.residency import Footprint, Launch, plan_residency
from epcomm.jit.sharing import share_cubins

__all__ = [
    "Footprint",
    "Kernel",
    "Launch",
    "Program",
    "current_device",
    "device_architecture",
    "device_uuid",
    "load_cupy",
    "max_shared_bytes",
    "num_sms",
    "nvshmem_version",
    "installed_nvshmem",
    "plan_residency",
    "share_cubins",
]
