"""Small windows on a GPU, so that few rows take many rounds."""

from __future__ import annotations

import pytest

__all__ = ["shrink_window"]


def shrink_window(patch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Give the Buffers that are constructed next a window of `num_bytes` on each rank; the same on all ranks."""
    for module in ("epcomm.kernels.window", "epcomm.backends.cuda.regions"):
        patch.setattr(f"{module}.WINDOW_BYTES", num_bytes)
