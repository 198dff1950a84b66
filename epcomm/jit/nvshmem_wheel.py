"""NVSHMEM as pip installs it: headers, device library and host library of one version."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

from epcomm.errors import MissingDependency

__all__ = ["MIN_VERSION", "NvshmemWheel", "find_nvshmem"]

# The oldest one whose headers and library were linked and run this way.
MIN_VERSION = (3, 4, 5)

_VERSION = re.compile(r"^#define NVSHMEM_VENDOR_(MAJOR|MINOR|PATCH)_VERSION (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class NvshmemWheel:
    """What is installed.

    Attributes:
        folder: holds ``include`` and ``lib``.
        version: (major, minor, patch), of the headers. Kernels and host library must come from the same wheel: what the
            device library knows of the host's structures changes even between minor versions.
    """

    folder: Path
    version: tuple[int, int, int]

    @property
    def headers(self) -> Path:
        """Include folder."""
        return self.folder / "include"

    @property
    def device_library(self) -> Path:
        """Archive that kernels are linked with."""
        return self.folder / "lib" / "libnvshmem_device.a"

    @property
    def host_library(self) -> Path:
        """Shared library that this process loads."""
        return self.folder / "lib" / "libnvshmem_host.so.3"

    def __str__(self) -> str:
        return f"NVSHMEM {_dotted(self.version)}"


@functools.cache
def find_nvshmem(cuda_major: int) -> NvshmemWheel:
    """The wheel for that major version of CUDA, which is the compiler's.

    Raises:
        MissingDependency: it is not installed, too old or incomplete, or that for another CUDA is there too.
    """
    names = [f"nvidia-nvshmem-cu{major}" for major in (12, 13)]
    wanted = f"nvidia-nvshmem-cu{cuda_major}"
    do = f"pip install 'epcomm[cuda{cuda_major},nvshmem{cuda_major}]'"
    found = {name: folder for name in names if (folder := _folder_of(name)) is not None}
    if wanted not in found:
        got = f"{', '.join(found)} beside a compiler of CUDA {cuda_major}" if found else "none"
        raise MissingDependency("NVSHMEM", got=got, wanted=f"the package {wanted}", do=do)
    if len(found) > 1:
        # They share one folder: the files are those of whichever came last, and removing one breaks the other, too.
        do = f"pip uninstall -y {' '.join(found)}, then {do}"
        raise MissingDependency("NVSHMEM", got=" and ".join(found), wanted="one of them", do=do)
    wheel = NvshmemWheel(found[wanted], _version_of(found[wanted]))
    absent = [path.name for path in (wheel.device_library, wheel.host_library) if not path.is_file()]
    if absent or wheel.version == (0, 0, 0):
        missing = ", ".join(absent) or "its version header"
        raise MissingDependency(
            "NVSHMEM", got=f"{wanted} without {missing}", do=f"pip install --force-reinstall {wanted}"
        )
    if wheel.version < MIN_VERSION:
        raise MissingDependency(
            "NVSHMEM", got=_dotted(wheel.version), wanted=f"{_dotted(MIN_VERSION)} or newer", do=f"{do} --upgrade"
        )
    return wheel


def _folder_of(distribution: str) -> Path | None:
    try:
        return Path(str(importlib.metadata.distribution(distribution).locate_file("nvidia/nvshmem")))
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_of(folder: Path) -> tuple[int, int, int]:
    """From the header, (0, 0, 0) without it."""
    try:
        text = (folder / "include" / "non_abi" / "nvshmem_version.h").read_text()
    except OSError:
        return 0, 0, 0
    parts = dict(_VERSION.findall(text))
    return int(parts.get("MAJOR", 0)), int(parts.get("MINOR", 0)), int(parts.get("PATCH", 0))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
