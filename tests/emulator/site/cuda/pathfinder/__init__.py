"""Where CUDA's headers are: the emulator has its own."""

from __future__ import annotations

from emulated_gpu.programs import header_folder

__all__ = ["find_nvidia_header_directory"]


def find_nvidia_header_directory(name: str) -> str | None:
    return str(header_folder()) if name in ("cudart", "cccl") else None
