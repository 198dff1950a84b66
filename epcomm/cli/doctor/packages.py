"""What is installed, without importing it, and the pip lines for what is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

__all__ = ["find_library", "installed", "newer_or_equal", "pip_line"]


def installed(*names: str) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def newer_or_equal(version: str, wanted: tuple[int, ...]) -> bool:
    """Whether the leading numbers of `version` are at least `wanted`."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[: len(wanted)])
    return numbers >= wanted


def pip_line(extra: str, cuda_major: int) -> str:
    """The pip line of a CUDA extra, for the driver's CUDA; both when there is no driver (`cuda_major` 0)."""
    if cuda_major:
        return f"pip install 'epcomm[{extra}{12 if cuda_major < 13 else 13}]'"
    line = f"pip install 'epcomm[{extra}13]' ('epcomm[{extra}12]' if its driver is older than 580)"
    return f"on a machine with a GPU: {line}"


def find_library(pattern: str) -> list[Path]:
    """Files ``nvidia/*/lib/<pattern>`` of NVIDIA's wheels, which share one namespace package."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return sorted(path for folder in folders for path in folder.glob(f"*/lib/{pattern}"))
