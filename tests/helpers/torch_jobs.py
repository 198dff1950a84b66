"""Jobs of torch.distributed: N processes that meet in a file, without a launcher and its ports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

POLL_S = 0.02
FAILURE_GRACE_S = 2.0


def run_torch_ranks(
    n: int, command: Sequence[str], folder: Path, *, timeout_s: float = 90.0, env: dict[str, str] | None = None
) -> tuple[list[int], str]:
    """Run ``python COMMAND`` `n` times, with RANK, WORLD_SIZE and INIT_METHOD in the environment.

    When one process fails or the time runs out, the others are killed after a moment, as by torchrun.

    Returns:
        (return codes by rank, output of all ranks).
    """
    common = {
        **os.environ,
        "WORLD_SIZE": str(n),
        "INIT_METHOD": f"file://{folder / 'rendezvous'}",
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
        **(env or {}),
    }
    outputs = [(folder / f"rank{rank}.out").open("w+") for rank in range(n)]
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        deadline = time.monotonic() + timeout_s
        is_failing = False
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if not is_failing and any(process.returncode for process in processes):
                is_failing, deadline = True, time.monotonic() + FAILURE_GRACE_S
            time.sleep(POLL_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = []
    for rank, output in enumerate(outputs):
        output.seek(0)
        texts.append(f"---- rank {rank}, return code {processes[rank].returncode} ----\n{output.read()}")
        output.close()
    return [process.returncode for process in processes], "\n".join(texts)
