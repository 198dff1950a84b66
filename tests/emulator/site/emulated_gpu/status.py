"""Error codes, which the runtime and the driver share, and the exception that carries one."""

from __future__ import annotations

import enum

__all__ = ["GpuError", "Status"]


class Status(enum.IntEnum):
    """``CUDA_ERROR_<name>`` of cuda.h."""

    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    INVALID_DEVICE = 101
    INVALID_IMAGE = 200
    NO_BINARY_FOR_GPU = 209
    INVALID_HANDLE = 400
    NOT_FOUND = 500
    NOT_READY = 600
    LAUNCH_OUT_OF_RESOURCES = 701
    LAUNCH_FAILED = 719
    NOT_PERMITTED = 800
    STREAM_CAPTURE_UNSUPPORTED = 900
    STREAM_CAPTURE_INVALIDATED = 901
    STREAM_CAPTURE_MERGE = 902
    STREAM_CAPTURE_UNMATCHED = 903
    STREAM_CAPTURE_UNJOINED = 904
    STREAM_CAPTURE_ISOLATION = 905
    STREAM_CAPTURE_IMPLICIT = 906
    CAPTURED_EVENT = 907


class GpuError(Exception):
    """What an API function answers with instead of doing what it was asked for; `text` says why."""

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(f"{status.name}: {text}")
        self.status, self.text = status, text
