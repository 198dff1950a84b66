"""What the GPU tests stand on, as far as it can be tested without a GPU."""

from __future__ import annotations

import contextlib

import ml_dtypes
import numpy as np
import pytest
from helpers import frames
from helpers.gpu import MpsService

from epcomm.bootstrap import mps


@pytest.fixture
def service(monkeypatch):
    """(an MpsService, the starts and stops of its daemons)."""
    events = []

    @contextlib.contextmanager
    def running():
        events.append("start")
        yield {"CUDA_MPS_PIPE_DIRECTORY": f"folder {len(events)}"}
        events.append("stop")

    monkeypatch.setattr(mps, "running", running)
    monkeypatch.setattr(mps, "is_installed", lambda: True)
    return MpsService(), events


def test_one_daemon_serves_all_jobs_until_one_ends_badly(service):
    mine, events = service
    assert events == []
    first = mine.environment()
    assert mine.environment() == first == {"CUDA_MPS_PIPE_DIRECTORY": "folder 1"}
    mine.stop()
    mine.stop()
    assert events == ["start", "stop"]
    assert mine.environment() != first
    assert events == ["start", "stop", "start"]
    mine.stop()


def test_without_mps(monkeypatch):
    monkeypatch.setattr(mps, "is_installed", lambda: False)
    mine = MpsService()
    assert mine.environment() == {}
    mine.stop()


ARRAYS = {
    "plain": np.arange(12, dtype=np.float32).reshape(3, 4),
    "columns": np.asfortranarray(np.arange(12, dtype=np.int64).reshape(3, 4)),
    "sliced": np.arange(40, dtype=np.float16).reshape(4, 10)[1:, 1::3],
    "one_dimension": np.arange(9, dtype=np.uint8)[3:],
    "bfloat16": np.arange(8, dtype=np.float32).astype(ml_dtypes.bfloat16)[1:],
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_what_is_brought_up_keeps_its_strides_and_its_alignment(array):
    raw, skip = frames._span(array)
    assert skip == array.ctypes.data % 16
    copy = np.ndarray(array.shape, array.dtype, raw, skip, array.strides)
    assert np.array_equal(copy.astype(np.float64), array.astype(np.float64))
    with pytest.raises((TypeError, ValueError)):
        np.ndarray(array.shape, array.dtype, raw[:-1], skip, array.strides)


def test_what_goes_up_and_what_does_not():
    seen = []
    frame = frames.Frames("test", lambda array: seen.append(array) or "up", lambda: None)
    masked = np.ma.masked_array(np.zeros(2))
    given = {"a": np.zeros(3), "b": (np.ones(2), None, 5), "c": [1.0], "d": masked}
    assert frames.up_all(frame, given) == {"a": "up", "b": ("up", None, 5), "c": [1.0], "d": masked}
    assert len(seen) == 2


def test_numpy_stays_where_it_is():
    array = np.zeros(3)
    assert frames.NUMPY.up(array) is array
    assert frames.down(array) is array
    assert frames.down((array, None)) == (array, None)
