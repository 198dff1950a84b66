"""One call of a Buffer on the host: NumPy views in, the caller's framework out, and nothing to wait for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.arrays import ArrayView, Place, empty, export_array
from epcomm.event import EventOverlap

__all__ = ["HostTurn"]


class HostTurn:
    """See `epcomm.backends.protocol.Turn`."""

    place: Place = "cpu"
    stream = None
    ref = None

    def take(self, view: ArrayView) -> NDArray[Any]:
        return view.numpy()

    def values(self, view: ArrayView) -> NDArray[Any]:
        return view.numpy()

    def checked_values(self, view: ArrayView) -> NDArray[Any]:
        return view.numpy()

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return empty(shape, dtype)

    def export(self, array: NDArray[Any], framework: str) -> Any:
        return export_array(array, framework)

    def finish(self, inputs: object) -> EventOverlap:
        return EventOverlap()
