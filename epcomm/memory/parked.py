"""Memory whose Buffer is gone while arrays over it are still held: kept, and closed when it can be.

Closing needs the driver, so neither the finalizer of the last array nor the end of the interpreter may do it. The next
Buffer of the process does (`sweep`); what is left at exit, the driver frees.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from epcomm.memory.blocks import BlockPool

__all__ = ["close_or_park", "sweep"]

_parked: list[tuple[BlockPool, Callable[[], None]]] = []
_lock = threading.Lock()


def close_or_park(pool: BlockPool, close: Callable[[], None]) -> bool:
    """Call `close` if nothing uses the blocks of `pool`, else keep both for `sweep`. Does not block.

    Args:
        pool: nothing will be allocated from it any more.
        close: gives the pool's memory back; does not wait.

    Returns:
        Whether it was closed.
    """
    if pool.settle():
        pool.close()
        close()
        return True
    with _lock:
        _parked.append((pool, close))
    return False


def sweep(*, synchronize: bool = False) -> int:
    """Close what has come free since; how many pools stay parked.

    Args:
        synchronize: wait for the device once for pools that only hidden readers hold. Never where ranks are threads
            of one process.
    """
    with _lock:
        parked, _parked[:] = list(_parked), []
    left = [(pool, close) for pool, close in parked if not _close_if_free(pool, close, synchronize)]
    with _lock:
        _parked.extend(left)
        return len(_parked)


def _close_if_free(pool: BlockPool, close: Callable[[], None], synchronize: bool) -> bool:
    is_free = pool.settle() or (synchronize and not pool.stats["num_live"] and pool.settle(synchronize=True))
    if is_free:
        pool.close()
        close()
    return is_free
