"""An uncaught exception on one rank ends the job, instead of leaving its peers waiting for ever.

Under plain ``python`` a rank that dies of an exception first waits in MPI_Finalize for the others, which wait
for it. (``python -m mpi4py`` and ``epcomm run`` handle that themselves, and ``sys.exit`` too, which no hook sees.)
"""

from __future__ import annotations

import sys
from types import TracebackType

from epcomm import env
from epcomm.bootstrap.communicator import Communicator
from epcomm.bootstrap.local import LocalCommunicator

__all__ = ["install_abort_hook"]

_installed = False


def install_abort_hook(comm: Communicator) -> bool:
    """Chain ``sys.excepthook``: after the traceback was printed, ``comm.abort(1)``. Not collective.

    Installed once in a process, for the first communicator of several ranks. Not for ranks that are threads,
    and not if ``EPCOMM_ABORT=0``. Exceptions in other threads than the main one are left alone: they do not
    end a Python program, so the rank goes on answering its peers.

    Returns:
        Whether the hook is installed now.
    """
    global _installed
    if _installed or comm.size == 1 or isinstance(comm, LocalCommunicator) or not env.get("EPCOMM_ABORT"):
        return _installed
    previous = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        try:
            previous(kind, value, trace)
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:  # closed by a daemonised program
                    stream.flush()
            comm.abort(1)

    sys.excepthook = hook
    _installed = True
    return True
