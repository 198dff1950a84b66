"""``Buffer.barrier`` on the host backend, with ranks as threads."""

from __future__ import annotations

import pytest

from epcomm import Buffer, errors
from epcomm.bootstrap import run_local


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_nobody_leaves_before_all_have_come(num_ranks):
    arrived = []

    def program(comm):
        with Buffer(comm, backend="host") as buffer:
            counts = []
            for turn in range(1, 6):
                arrived.append(comm.rank)
                buffer.barrier(stream=7)  # no meaning here
                counts.append(len(arrived) >= turn * num_ranks)
                comm.barrier()
            return counts

    assert run_local(num_ranks, program) == [[True] * 5] * num_ranks


def test_a_rank_that_does_not_come_is_named():
    def program(comm):
        with Buffer(comm, backend="host", timeout_s=0.2) as buffer:
            if comm.rank == 1:
                comm.barrier()
                return ""
            try:
                with pytest.raises(errors.PeerTimeout) as caught:
                    buffer.barrier()
            finally:
                comm.barrier()
            return str(caught.value)

    message = run_local(2, program)[0]
    assert message.startswith("barrier, phase ")
    assert "from rank 1" in message


def test_the_stream_reaches_the_backend(monkeypatch):
    with Buffer(backend="host") as buffer:
        begin, streams = buffer._backend.turn, []

        def turn(framework, stream, *rest):
            streams.append((framework, stream))
            return begin(framework, stream, *rest)

        monkeypatch.setattr(buffer._backend, "turn", turn)
        buffer.barrier(stream=7)
    assert streams == [(None, 7)]
