"""The host backend: NumPy and shared memory, MPI messages between hosts. Runs anywhere, hides nothing."""

from epcomm.backends.host.backend import HostBackend

__all__ = ["HostBackend"]
