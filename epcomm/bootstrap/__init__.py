"""Who are we: the ranks of a job, how they talk before there is shared memory, and how they are started.

Importing this loads neither MPI nor NumPy; `as_communicator` loads MPI when it has to.
"""

from epcomm.bootstrap.abort import install_abort_hook
from epcomm.bootstrap.communicator import Communicator, SoloCommunicator, as_communicator
from epcomm.bootstrap.launcher import Mpirun, find_mpirun, job_environment, run_ranks
from epcomm.bootstrap.local import LocalCommunicator, LocalGroup, run_local
from epcomm.bootstrap.topology import Topology, discover, host_identity

__all__ = [
    "Communicator",
    "LocalCommunicator",
    "LocalGroup",
    "Mpirun",
    "SoloCommunicator",
    "Topology",
    "as_communicator",
    "discover",
    "find_mpirun",
    "host_identity",
    "install_abort_hook",
    "job_environment",
    "run_local",
    "run_ranks",
]
