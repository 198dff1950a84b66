"""Where the CUDA sources are: in the wheel, or at the top of a checkout (editable installs)."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from epcomm import env
from epcomm.errors import MissingDependency

__all__ = ["cuda_src_dir", "source_digest", "source_files"]

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


def source_digest() -> str:
    """Digest over the names and contents of all CUDA sources, so that an edit of any header changes it.

    Files are read again only when their size or time of modification has changed.
    """
    root = cuda_src_dir()
    stamps = []
    for path in source_files():
        status = (root / path).stat()
        stamps.append((path.as_posix(), status.st_size, status.st_mtime_ns))
    return _digest(root, tuple(stamps))


@functools.lru_cache(maxsize=4)
def _digest(root: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, _, _ in stamps:
        text = (root / name).read_bytes()
        digest.update(f"{name}\0{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()
