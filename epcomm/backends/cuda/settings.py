"""What a Buffer asks of the CUDA backend."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What a Buffer asks for; the same on all ranks, but for the device.

    Attributes:
        num_arena_bytes: bytes of each rank's arena.
        num_low_latency_bytes: bytes of its low-latency area.
        num_network_bytes: bytes of its rings for what goes to and comes from other nodes, if there are several.
        low_latency_mode: low-latency operations are wanted.
        masks_on_timeout: in them, ranks that do not come in time are masked.
        num_queue_pairs: to each rank of other nodes. 0: what NVSHMEM has by itself.
        timeout_s: bound of the waits on the GPU.
        device: CUDA device number, or None.
    """

    num_arena_bytes: int
    num_low_latency_bytes: int
    num_network_bytes: int
    low_latency_mode: bool
    masks_on_timeout: bool
    num_queue_pairs: int
    timeout_s: float
    device: int | None
