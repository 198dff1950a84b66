"""NVSHMEM's host library through ctypes: the few functions that are used, as plain calls.

Most of them end the process, by exit(), when they are called at the wrong time: before a start that has succeeded, or
with an address outside of the heap. Whoever calls them knows better; `epcomm.memory.nvshmem` does.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

from epcomm.errors import MissingDependency

__all__ = ["DEFAULT_QUEUE_PAIR", "STATUS_NAMES", "NvshmemLibrary", "QueuePairs", "Started"]

# What nvshmemx_init_status says. MPG: several PEs on one GPU; limited: without collectives on teams.
STATUS_NAMES = (
    "not initialised",
    "bootstrapped, but without a GPU",
    "initialised",
    "initialised, limited MPG",
    "initialised, full MPG",
)

DEFAULT_QUEUE_PAIR = 1  # NVSHMEMX_QP_DEFAULT, the handle for NVSHMEM's own choice

_WITH_UNIQUE_ID = 1 << 3  # NVSHMEMX_INIT_WITH_UNIQUEID


# The first layout of these structures, which every 3.x takes; `version` says which one it is.
class _UniqueId(ctypes.Structure):
    _fields_ = (("version", ctypes.c_int), ("internal", ctypes.c_char * 124))


class _UniqueIdArgs(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_int),
        ("id", ctypes.POINTER(_UniqueId)),
        ("rank", ctypes.c_int),
        ("num_ranks", ctypes.c_int),
    )


class _InitArgs(ctypes.Structure):
    _fields_ = (("version", ctypes.c_int), ("unique_id", _UniqueIdArgs), ("content", ctypes.c_char * 96))


class _InitAttributes(ctypes.Structure):
    _fields_ = (("version", ctypes.c_int), ("mpi_comm", ctypes.c_void_p), ("args", _InitArgs))


assert [ctypes.sizeof(t) for t in (_UniqueId, _UniqueIdArgs, _InitArgs, _InitAttributes)] == [128, 24, 128, 144]

_ADDRESS, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "nvshmemx_vendor_get_version_info": (None, (ctypes.POINTER(_INT),) * 3),
    "nvshmemx_init_status": (_INT, ()),
    "nvshmemx_get_uniqueid": (_INT, (ctypes.POINTER(_UniqueId),)),
    "nvshmemx_set_attr_uniqueid_args": (
        _INT,
        (_INT, _INT, ctypes.POINTER(_UniqueId), ctypes.POINTER(_InitAttributes)),
    ),
    "nvshmemx_hostlib_init_attr": (_INT, (ctypes.c_uint, ctypes.POINTER(_InitAttributes))),
    "nvshmem_my_pe": (_INT, ()),
    "nvshmem_n_pes": (_INT, ()),
    "nvshmem_malloc": (_ADDRESS, (_SIZE,)),
    "nvshmem_ptr": (_ADDRESS, (_ADDRESS, _INT)),
    "nvshmemx_cumodule_init": (_INT, (_ADDRESS,)),
    "nvshmemx_cumodule_finalize": (_INT, (_ADDRESS,)),
}
_HANDLES = ctypes.POINTER(_INT)
_FUNCTIONS_SINCE_3_5: dict[str, tuple[object, tuple[object, ...]]] = {
    "nvshmemx_qp_create": (_INT, (_INT, ctypes.POINTER(_HANDLES))),
}


class Started(NamedTuple):
    """What came of a start: the code that it returned (0: good), and the status after it (see `STATUS_NAMES`)."""

    code: int
    status: int

    @property
    def is_usable(self) -> bool:
        """NVSHMEM 3.4 returns 0 where it has found no GPU; the status tells."""
        return self.code == 0 and self.status >= 2


class QueuePairs(NamedTuple):
    """What came of making queue pairs: the code that was returned (0: good), and their handles."""

    code: int
    handles: tuple[int, ...]


class NvshmemLibrary:
    """The loaded library. Loading starts nothing.

    Args:
        path: of ``libnvshmem_host.so.3``; its plugins lie beside it.

    Attributes:
        has_queue_pairs: `create_queue_pairs` is there, as since 3.5.

    Raises:
        MissingDependency: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)  # its plugins use its symbols
            self.has_queue_pairs = hasattr(self._library, "nvshmemx_qp_create")
            functions = {**_FUNCTIONS, **(_FUNCTIONS_SINCE_3_5 if self.has_queue_pairs else {})}
            for name, (result, arguments) in functions.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise MissingDependency(
                "NVSHMEM", got=str(error), wanted=f"the host library {path}", do="reinstall its package"
            ) from error

    def version(self) -> tuple[int, int, int]:
        """(major, minor, patch)."""
        parts = [ctypes.c_int() for _ in range(3)]
        self._library.nvshmemx_vendor_get_version_info(*map(ctypes.byref, parts))
        major, minor, patch = (part.value for part in parts)
        return major, minor, patch

    def status(self) -> int:
        """Index into `STATUS_NAMES`."""
        return int(self._library.nvshmemx_init_status())

    def unique_id(self) -> bytes | None:
        """Where the ranks of one job find each other; made by one rank, for all. None: it failed."""
        unique_id = _UniqueId(version=_version_of(_UniqueId))
        code = self._library.nvshmemx_get_uniqueid(ctypes.byref(unique_id))
        return None if code else bytes(unique_id)

    def start(self, unique_id: bytes, rank: int, num_ranks: int) -> Started:
        """Initialise, as that PE of `num_ranks`. Collective over all of them, without a bound.

        The context of this rank's GPU is current in the calling thread.
        """
        own_id = _UniqueId.from_buffer_copy(unique_id)
        attributes = _InitAttributes(version=_version_of(_InitAttributes))
        attributes.args.version = _version_of(_InitArgs)
        attributes.args.unique_id.version = _version_of(_UniqueIdArgs)
        pointer = ctypes.byref(attributes)
        code = self._library.nvshmemx_set_attr_uniqueid_args(rank, num_ranks, ctypes.byref(own_id), pointer)
        if code == 0:
            code = self._library.nvshmemx_hostlib_init_attr(_WITH_UNIQUE_ID, pointer)
        return Started(int(code), self.status())

    def my_pe(self) -> int:
        """This process's PE."""
        return int(self._library.nvshmem_my_pe())

    def num_pes(self) -> int:
        """All PEs."""
        return int(self._library.nvshmem_n_pes())

    def malloc(self, num_bytes: int) -> int:
        """Address of so many bytes of the heap, 0: there is no room. Collective over all PEs, without a bound."""
        return int(self._library.nvshmem_malloc(num_bytes) or 0)

    def ptr(self, address: int, pe: int) -> int:
        """Where this GPU's kernels reach that place of the PE's heap by plain loads and stores, 0: nowhere."""
        return int(self._library.nvshmem_ptr(address, pe) or 0)

    def is_behind_network(self, address: int, pe: int) -> bool:
        """Whether what kernels put at that place of the PE's heap goes through the network."""
        return self.ptr(address, pe) == 0

    def create_queue_pairs(self, count: int) -> QueuePairs:
        """Make so many queue pairs to every PE; a handle is good for all of them.

        Collective over all PEs, with the same `count`, without a bound; waits for all kernels of this GPU. Handles are
        `DEFAULT_QUEUE_PAIR` where the transport has no queue pairs to be chosen from.
        """
        array = _HANDLES()  # its memory must stay, says NVSHMEM
        code = int(self._library.nvshmemx_qp_create(count, ctypes.byref(array)))
        return QueuePairs(code, () if code or not array else tuple(array[:count]))

    def register_module(self, module: int) -> int:
        """Fill the state of a ``CUmodule`` that is linked with the device library; 0: good."""
        return int(self._library.nvshmemx_cumodule_init(module))

    def unregister_module(self, module: int) -> int:
        """Before the module is unloaded; 0: good."""
        return int(self._library.nvshmemx_cumodule_finalize(module))


def _version_of(structure: type[ctypes.Structure]) -> int:
    return (1 << 16) + ctypes.sizeof(structure)
