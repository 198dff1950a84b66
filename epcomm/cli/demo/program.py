"""What every rank of the demo does, and what rank 0 makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from epcomm.bootstrap import Communicator, Topology
from epcomm.buffer import Buffer
from epcomm.cli.demo.arrays import arrays_of
from epcomm.cli.demo.checks import LayerError, Routing, check_combine, check_dispatch, compare_layers
from epcomm.cli.demo.layer import PHASES, Forward, PhaseTimer, forward
from epcomm.cli.demo.model import BFLOAT16, Expert, LayerConfig, MoeLayer
from epcomm.cli.demo.text import first_tokens
from epcomm.config import Config

__all__ = ["NUM_TIMED", "Outcome", "Task", "run_ranks_part"]

NUM_TIMED = 3  # passes, after one that warms up


@dataclass(frozen=True)
class Task:
    """What to run: sizes, the text and its name, the backend asked for and the file of the picture."""

    config: LayerConfig
    text: bytes
    text_name: str
    backend: str
    plot: str | None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the ranks found, for the report.

    Attributes:
        task: what was run.
        backend: the backend that ran it.
        machine: what computed.
        topology: of the job.
        rows: int64 ``[R, R]``, rows that rank i sent to rank j.
        expert_load: int64 ``[R, L]``, tokens of each expert, by the rank that owns it.
        dispatch_problems, combine_problems: by rank, the first difference or "".
        error: the layer against the dense layer.
        times_s: by phase, of the slowest rank.
    """

    task: Task
    backend: str
    machine: str
    topology: Topology
    rows: NDArray[np.int64]
    expert_load: NDArray[np.int64]
    dispatch_problems: list[str]
    combine_problems: list[str]
    error: LayerError
    times_s: dict[str, float]

    @property
    def holds(self) -> bool:
        """All checks."""
        return not any(self.dispatch_problems) and not any(self.combine_problems) and self.error.holds

    @property
    def dispatch_row_bytes(self) -> int:
        """Bytes of a row, its expert indices and its weights."""
        return self.combine_row_bytes + self.task.config.num_topk * (8 + 4)

    @property
    def combine_row_bytes(self) -> int:
        """Bytes of a row."""
        return self.task.config.hidden * int(BFLOAT16.itemsize)


@dataclass(frozen=True, eq=False)
class _RankPart:
    """What one rank gives to rank 0."""

    output: NDArray[Any]
    rows_from: NDArray[np.int64]
    expert_load: NDArray[np.int64]
    dispatch_problem: str
    combine_problem: str
    times_s: list[dict[str, float]]


def run_ranks_part(comm: Communicator, task: Task) -> Outcome | None:
    """Run the layer on the ranks of `comm` and check it. Collective, blocks the host.

    Returns:
        The outcome on rank 0, None on the others.
    """
    config, layer = task.config, MoeLayer(task.config, task.text)
    first_token = first_tokens(len(task.text), comm.size)
    num_local = config.num_experts // comm.size
    x = layer.embed(range(first_token[comm.rank], first_token[comm.rank + 1]))
    arena_bytes = Config().get_nvl_buffer_size_hint(x.itemsize * config.hidden, comm.size)
    with Buffer(comm, arena_bytes, backend=task.backend) as buffer:
        arrays = arrays_of(buffer.backend)
        own = range(comm.rank * num_local, (comm.rank + 1) * num_local)
        experts = [arrays.put_expert(Expert.make(config, index)) for index in own]
        times_s: list[dict[str, float]] = []
        for _ in range(1 + NUM_TIMED):
            timer = PhaseTimer(comm, arrays)
            result = forward(buffer, arrays, layer, experts, x, timer)
            times_s.append(timer.times_s)
        echo = arrays.get(buffer.combine(result.dispatched.recv_x, result.dispatched.handle).combined_x)
        received = arrays.received(result.dispatched)
        topology, backend, machine = buffer.topology, buffer.backend, arrays.machine
    routing = _gather_routing(comm, result, first_token, num_local)
    parts = comm.allgather(
        _RankPart(
            output=result.output,
            rows_from=received.rows_from,
            expert_load=received.per_expert,
            dispatch_problem=check_dispatch(layer, routing, comm.rank, received),
            combine_problem=check_combine(x, routing, topology, echo),
            times_s=times_s[1:],
        )
    )
    return _conclude(task, (backend, machine), topology, layer, parts) if comm.rank == 0 else None


def _gather_routing(comm: Communicator, result: Forward, first_token: list[int], num_local: int) -> Routing:
    choices = comm.allgather((result.topk_idx, result.topk_weights))
    topk_idx, topk_weights = (np.concatenate(arrays) for arrays in zip(*choices, strict=True))
    return Routing(topk_idx, topk_weights, first_token, num_local)


def _conclude(
    task: Task, where: tuple[str, str], topology: Topology, layer: MoeLayer, parts: list[_RankPart]
) -> Outcome:
    """Compute the layer densely, gate included, and compare."""
    x = layer.embed(range(len(task.text)))
    want, magnitude = layer.dense(x, *layer.gate(x))
    slowest = {
        phase: [max(part.times_s[turn][phase] for part in parts) for turn in range(NUM_TIMED)] for phase in PHASES
    }
    return Outcome(
        task=task,
        backend=where[0],
        machine=where[1],
        topology=topology,
        rows=np.stack([part.rows_from for part in parts], axis=1),
        expert_load=np.stack([part.expert_load for part in parts]),
        dispatch_problems=[part.dispatch_problem for part in parts],
        combine_problems=[part.combine_problem for part in parts],
        error=compare_layers(np.concatenate([part.output for part in parts]), want, magnitude),
        times_s={phase: float(np.median(times)) for phase, times in slowest.items()},
    )
