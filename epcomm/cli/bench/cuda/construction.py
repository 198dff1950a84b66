"""How long it takes to construct a Buffer: with kernels that must be compiled, and with those of the disk cache.

Each in a process of its own, because a process compiles once. One rank; CUDA is started before the clock is.
"""

from __future__ import annotations

import subprocess
import tempfile
import time

from epcomm import env
from epcomm.bootstrap import SoloCommunicator
from epcomm.cli.doctor import child

__all__ = ["construction_s", "main"]

_LIMIT_S = 120.0
_MARK = "epcomm-bench-construction "


def construction_s() -> tuple[float, float] | None:
    """Seconds (compiling, from the disk cache); None if a process failed. Not collective, blocks the host."""
    with tempfile.TemporaryDirectory(prefix="epcomm-bench-") as folder:
        environment = env.child_environment({"EPCOMM_CACHE_DIR": folder})
        times = []
        for _ in range(2):
            try:
                done = subprocess.run(
                    child.command("epcomm.cli.bench.cuda.construction"),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    timeout=_LIMIT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return None
            answers = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
            if not answers:
                return None
            times.append(float(answers[-1].removeprefix(_MARK)))
    return times[0], times[1]


def main() -> int:
    """The child: print how long it took."""
    import cupy

    from epcomm.buffer import Buffer

    cupy.cuda.Device().synchronize()
    cupy.cuda.alloc_pinned_memory(1)
    start = time.perf_counter()
    with Buffer(SoloCommunicator(), num_nvl_bytes=64 << 20, backend="cuda", ranks_per_node=1):
        print(f"{_MARK}{time.perf_counter() - start}")
    return 0
