"""Where the CUDA sources are: in the wheel, or at the top of a checkout (editable installs)."""

from __future__ import annotations

from pathlib import Path

from epcomm import env
from epcomm.errors import MissingDependency

__all__ = ["cuda_src_dir", "source_files"]

_SUFFIXES = {".cu", ".cuh"}


def cuda_src_dir() -> Path:
    """Folder that holds ``common/``, ``kernels/`` and the rest of the CUDA sources.

    ``EPCOMM_CUDA_SRC`` wins, then a checkout's own folder, then the packaged copy. The checkout comes
    before the package because an editable install may leave an outdated copy behind.

    Raises:
        MissingDependency: no candidate holds any source file.
    """
    package = Path(__file__).resolve().parents[1]
    override = env.get("EPCOMM_CUDA_SRC")
    candidates = [Path(override)] if override else [package.parent / "cuda_src", package / "cuda_src"]
    for folder in candidates:
        if any(path.suffix in _SUFFIXES for path in folder.rglob("*")):
            return folder
    raise MissingDependency(
        "CUDA sources",
        got="none in " + " or ".join(map(str, candidates)),
        wanted="the .cu files that the package ships",
        do="reinstall epcomm, or correct EPCOMM_CUDA_SRC",
    )


def source_files() -> list[Path]:
    """All CUDA sources and headers, as sorted paths relative to `cuda_src_dir`."""
    root = cuda_src_dir()
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.suffix in _SUFFIXES)
