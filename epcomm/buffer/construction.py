"""What happens before a Buffer exists: settings that all ranks agree on, and the choice of a backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from epcomm import env
from epcomm.backends import Backend
from epcomm.backends.host import HostBackend
from epcomm.bootstrap import Communicator, Topology
from epcomm.errors import EpcommError, InputError, PeerError, RankMismatch, ShapeError, UnsupportedOption

__all__ = ["agree_on_settings", "choose_backend", "make_backend"]

_BACKENDS = ("auto", "host", "cuda")
_CHOICES = {"EPCOMM_BACKEND": _BACKENDS, "EPCOMM_TRANSPORT": ("auto", "ipc", "nvshmem")}
_AGREED_VARIABLES = ("EPCOMM_BACKEND", "EPCOMM_HOST_TRANSPORT", "EPCOMM_TRANSPORT")


def agree_on_settings(
    comm: Communicator, settings: dict[str, Any], *, ranks_per_node: Any, timeout_s: Any
) -> tuple[float, bool]:
    """Check this rank's arguments, and that all ranks passed the same `settings`. Collective.

    Args:
        comm: the ranks.
        settings: what must be equal on all ranks, by name; the environment is added.
        ranks_per_node, timeout_s: as for ``Buffer``; ranks may differ.

    Returns:
        Seconds of the bound of every wait, and whether ``EPCOMM_CHECK`` asks for checks of every index.

    Raises:
        InputError: an argument or an environment variable cannot be used, on this rank.
        PeerError, RankMismatch: on another one; the ranks differ.
    """
    problem: EpcommError | None = None
    seconds, check_routing = math.inf, False
    try:
        sizes = {name: settings[name] for name in ("num_nvl_bytes", "num_rdma_bytes")}
        _check_settings(sizes, settings["num_qps_per_rank"], settings["backend"], ranks_per_node)
        seconds, check_routing = _timeout(timeout_s), env.get("EPCOMM_CHECK")
    except EpcommError as error:
        problem = error
    environment = {name: env.lookup(name) for name in _AGREED_VARIABLES}
    _agree(comm, {**settings, **environment}, problem)
    return seconds, check_routing


def make_backend(
    comm: Communicator, topology: Topology, settings: dict[str, Any], timeout_s: float, device: int | None
) -> Backend:
    """The backend of a Buffer. Collective, blocks the host.

    Raises:
        UnsupportedOption: the wanted one does not work on some rank.
        Exception: what its constructor raises.
    """
    if choose_backend(comm, topology, settings["backend"]) == "host":
        return HostBackend(comm, topology, timeout_s, settings["enable_shrink"])
    from epcomm.backends.cuda import CudaBackend, Settings

    chosen = Settings(
        num_arena_bytes=int(settings["num_nvl_bytes"]),
        num_low_latency_bytes=int(settings["num_rdma_bytes"]),
        num_network_bytes=int(settings["num_rdma_bytes"]),
        low_latency_mode=settings["low_latency_mode"],
        masks_on_timeout=settings["enable_shrink"],
        num_queue_pairs=int(settings["num_qps_per_rank"]),
        timeout_s=timeout_s,
        device=device,
    )
    return CudaBackend(comm, topology, chosen)


def _agree(comm: Communicator, settings: dict[str, Any], problem: EpcommError | None) -> None:
    """Raise on all ranks if one of them has a problem, or if their settings differ. Collective."""
    answers = comm.allgather((str(problem) if problem else "", settings))
    if problem is not None:
        raise problem
    problems = {rank: text for rank, (text, _) in enumerate(answers) if text}
    if problems:
        raise PeerError("Buffer", problems)
    table = {name: [theirs[name] for _, theirs in answers] for name in settings}
    differing = {name: values for name, values in table.items() if any(value != values[0] for value in values)}
    if differing:
        raise RankMismatch("Buffer: ranks disagree", differing)


def _check_settings(sizes: dict[str, Any], num_qps_per_rank: Any, backend: str, ranks_per_node: int | None) -> None:
    for name in env.VARIABLES:
        env.get(name)  # here, where all ranks hear of it, instead of in the middle of what follows
    for name, value in sizes.items():
        if not isinstance(value, int | np.integer) or value < 0:
            raise ShapeError(name, got=repr(value), wanted="a number of bytes, 0 or more")
    if not isinstance(num_qps_per_rank, int | np.integer) or num_qps_per_rank < 0:
        raise InputError("num_qps_per_rank", got=repr(num_qps_per_rank), wanted="a number of queue pairs, 0 or more")
    if ranks_per_node is not None and not isinstance(ranks_per_node, int | np.integer):
        raise ShapeError("ranks_per_node", got=repr(ranks_per_node), wanted="a number of ranks, or None")
    if backend not in _BACKENDS:
        raise InputError("backend", got=repr(backend), wanted="'auto', 'host' or 'cuda'")
    for name, choices in _CHOICES.items():
        if env.get(name) not in choices:
            wanted = ", ".join(choices[:-1]) + " or " + choices[-1]
            raise InputError(name, got=repr(env.get(name)), wanted=wanted, do="correct the environment variable")


def _timeout(timeout_s: Any) -> float:
    name, value = ("EPCOMM_TIMEOUT_S", env.get("EPCOMM_TIMEOUT_S")) if timeout_s is None else ("timeout_s", timeout_s)
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(name, got=repr(value), wanted="a number of seconds, more than 0", do="every wait has an end")
    return seconds


def choose_backend(comm: Communicator, topology: Topology, wanted: str) -> str:
    """ "host" or "cuda", the same on all ranks. Collective.

    Raises:
        UnsupportedOption: "cuda" is wanted, and some rank cannot.
    """
    if wanted == "auto":
        wanted = env.get("EPCOMM_BACKEND")
    if wanted == "host":
        return "host"
    from epcomm.backends import cuda

    problem = cuda.why_not() or cuda.why_no_network(topology)
    problems = {rank: text for rank, text in enumerate(comm.allgather(problem)) if text}
    if problems and wanted == "cuda":
        listed = "; ".join(f"rank {rank}: {text}" for rank, text in problems.items())
        raise UnsupportedOption(
            "backend='cuda'", got=listed, do="pass backend='host'; `epcomm doctor` shows what works"
        )
    return "host" if problems else "cuda"
