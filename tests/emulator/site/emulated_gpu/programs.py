"""CUDA text to a program of the emulator, by ``tests/emulator/compiler.py``."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from types import ModuleType

__all__ = ["compile_text", "header_folder"]

_EMULATOR = Path(__file__).parents[2]


def compile_text(text: str, name: str, options: list[str]) -> bytes:
    """The program, as `emulated_gpu.modules.load` takes it; raises ValueError with the compiler's words."""
    compiler = _compiler()
    try:
        return bytes(compiler.compile_text(text, name, options))
    except compiler.CompilationFailed as error:
        raise ValueError(str(error)) from error


@functools.cache
def _compiler() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulated_gpu_compiler", _EMULATOR / "compiler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def header_folder() -> Path:
    """A folder in the place of CUDA's headers, whose name stands for the emulator's own.

    epcomm keeps compiled programs on disk by the folders of CUDA's headers: another version of the emulator is to
    compile anew, and a real GPU is never to meet its programs.
    """
    digest = hashlib.sha256()
    for path in sorted([*(_EMULATOR / "device").rglob("*.cuh"), *(_EMULATOR / "device").rglob("*.h")]):
        digest.update(path.read_bytes())
    digest.update((_EMULATOR / "compiler.py").read_bytes())
    parent = Path(tempfile.gettempdir()) / f"epcomm-emulator-headers-{os.geteuid()}"
    folder = parent / digest.hexdigest()[:16]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mark = folder / "cuda_runtime_api.h"
    if not mark.exists():
        mark.touch()
    return folder
