"""The CUDA backend: ranks whose kernels address each other's memory, or reach it through NVSHMEM."""

from epcomm.backends.cuda.backend import CudaBackend
from epcomm.backends.cuda.settings import Settings
from epcomm.backends.cuda.streams import capture_event
from epcomm.backends.cuda.usable import why_no_network, why_not

__all__ = ["CudaBackend", "Settings", "capture_event", "why_no_network", "why_not"]
