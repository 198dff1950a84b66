"""CUDA text in, cubin out: NVRTC through cuda-bindings. Needs neither a GPU nor a driver.

CuPy's compiler is no substitute: it flushes subnormals, and its cache does not see edits of included headers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epcomm.errors import CompileError, MissingDependency
from epcomm.jit.linker import link_with_nvshmem, linked_architecture
from epcomm.jit.nvshmem_wheel import NvshmemWheel, find_nvshmem
from epcomm.jit.source import cuda_src_dir

__all__ = [
    "Program",
    "compile_program",
    "compile_text",
    "compiler_options",
    "header_folders",
    "nvrtc_version",
    "nvshmem_version",
    "installed_nvshmem",
]

_PIP_LINE = "pip install 'epcomm[cuda13]', or 'epcomm[cuda12]' for a driver that is older than CUDA 13"

# fp32 keeps subnormals and rounds each operation as it is spelled (no --use_fast_math): results are compared bit for
# bit with those of the host. A source folder that NVRTC adds by itself would be one below the working folder.
_OPTIONS = ("-std=c++17", "-ftz=false")
_NO_SOURCE_FOLDER = "-no-source-include"

# The headers of NVSHMEM include their neighbours, and so do those of CUDA that they need: NVRTC must look beside each
# file. NVSHMEM 3.4 has functions in them that do not say that they are the device's.
_NVSHMEM_OPTIONS = ("-rdc=true", "-default-device")

# An error of the front end begins with "file(line): error"; what follows, up to the next message, explains it.
_MESSAGE = re.compile(r"^(\S.*\(\d+\): )?(catastrophic |fatal )?(error|warning|remark|note)\b|^ptxas |^nvrtc: ")
_ERROR = re.compile(r"\berror\b")
_MAX_ERRORS, _MAX_LINES_PER_ERROR = 3, 6


@dataclass(frozen=True)
class Program:
    """What is compiled to one cubin.

    Attributes:
        source: file, relative to the folder of the CUDA sources: ``"kernels/dispatch.cu"``.
        defines: (name, value) of macros; kept sorted, so that programs that mean the same are equal.
        nvshmem: it includes ``transport/nvshmem.cuh``, and is linked with NVSHMEM's device library.
    """

    source: str
    defines: tuple[tuple[str, str], ...] = ()
    nvshmem: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "defines", tuple(sorted(self.defines)))

    def __str__(self) -> str:
        linked = ["(with NVSHMEM)"] if self.nvshmem else []
        return " ".join([self.source, *(f"-D{name}={value}" for name, value in self.defines), *linked])


def compile_program(program: Program, architecture: str) -> bytes:
    """Compile one program. Not collective, blocks the host (0.1 s to some seconds) without holding the GIL.

    Args:
        program: what to compile.
        architecture: compute capability without the dot, ``"80"``, ``"90"`` or ``"100"``; ``"90a"`` is accepted too.

    Returns:
        The cubin, which every GPU of that major architecture loads (with a suffix: that architecture alone).

    Raises:
        CompileError: the source is not there, or NVRTC or nvJitLink rejected it; has the options and the log.
        MissingDependency: cuda-bindings, NVRTC or the CUDA headers are not installed; for a program that is linked with
            NVSHMEM: nor are nvJitLink and NVSHMEM.
    """
    path = cuda_src_dir() / program.source
    try:
        text = path.read_text()
    except OSError as error:
        raise CompileError(program.source, got=error.strerror, wanted=f"the file {path}") from error
    return compile_text(text, program.source, architecture, program.defines, nvshmem=program.nvshmem)


def compile_text(
    text: str, name: str, architecture: str, defines: Iterable[tuple[str, str]] = (), *, nvshmem: bool = False
) -> bytes:
    """As `compile_program`, for a text that may include the CUDA sources; `name` stands for it in messages."""
    if not nvshmem:
        return _compile(text, name, compiler_options(architecture, defines))
    architecture = linked_architecture(architecture)
    options = compiler_options(architecture, defines, nvshmem=True)
    # Of a relative name NVRTC would take the folder below the working folder.
    cubin = _compile(text, name, options, file=str(cuda_src_dir() / name))
    return link_with_nvshmem(cubin, name, architecture, installed_nvshmem())


def _compile(text: str, name: str, options: list[str], file: str = "") -> bytes:
    nvrtc = _nvrtc()
    program = _checked(nvrtc.nvrtcCreateProgram(text.encode(), (file or name).encode(), 0, [], []))
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = _output(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
            log = log.rstrip("\0\n ") or result.name
            raise CompileError(
                name,
                got=f"from NVRTC {'.'.join(map(str, nvrtc_version()))}:\n{_errors_of(log)}\n",
                do=f"options were {' '.join(options)}",
                options=options,
                log=log,
            )
        return _output(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compiler_options(architecture: str, defines: Iterable[tuple[str, str]] = (), *, nvshmem: bool = False) -> list[str]:
    """All options that a program is compiled with, include folders among them."""
    return [
        f"-arch=sm_{architecture}",
        *_OPTIONS,
        *(_NVSHMEM_OPTIONS if nvshmem else (_NO_SOURCE_FOLDER,)),
        *(f"-D{name}={value}" for name, value in defines),
        f"-I{cuda_src_dir()}",
        *(f"-I{folder}" for folder in header_folders()),
        *([f"-I{installed_nvshmem().headers}"] if nvshmem else []),
    ]


def installed_nvshmem() -> NvshmemWheel:
    """The NVSHMEM that belongs to the compiler.

    Raises:
        MissingDependency: the compiler is not installed, or NVSHMEM is not, for that CUDA, or too old.
    """
    return find_nvshmem(nvrtc_version()[0])


def nvshmem_version() -> tuple[int, int, int]:
    """(major, minor, patch) of `installed_nvshmem`; raises as it does."""
    return installed_nvshmem().version


@functools.cache
def header_folders() -> tuple[Path, ...]:
    """Include folders of CUDA itself: the runtime's headers, and libcu++ beside or below them.

    Raises:
        MissingDependency: they are not installed.
    """
    _nvrtc()
    import cuda.pathfinder

    found = [cuda.pathfinder.find_nvidia_header_directory(name) for name in ("cudart", "cccl")]
    if not all(found):
        raise MissingDependency(
            "CUDA headers", got="none", wanted="those of the CUDA runtime and of CCCL (libcu++)", do=_PIP_LINE
        )
    candidates = [folder for name in found for folder in (Path(name), Path(name) / "cccl")]
    return tuple(folder for folder in dict.fromkeys(candidates) if folder.is_dir())


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the compiler.

    Raises:
        MissingDependency: cuda-bindings or the NVRTC library is not installed.
    """
    nvrtc = _nvrtc()
    try:
        _, major, minor = nvrtc.nvrtcVersion()  # the first call loads the library
    except RuntimeError as error:
        raise MissingDependency(
            "NVRTC", got=str(error).strip().splitlines()[0], wanted="the library libnvrtc", do=_PIP_LINE
        ) from error
    return major, minor


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise MissingDependency("cuda-bindings", got=str(error), wanted="the package", do=_PIP_LINE) from error
    return nvrtc


def _checked(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if error.value != 0:
        raise CompileError("NVRTC", got=error.name, do="look at the memory of this machine")
    return values[0] if values else None


def _output(program: Any, size_of: Any, write: Any) -> bytes:
    """One of the two results of a compilation."""
    data = bytes(_checked(size_of(program)))
    _checked(write(program, data))  # into the memory of `data`, as cuda-bindings has it
    return data


def _errors_of(log: str) -> str:
    """The first errors of a log, each with the lines that belong to it."""
    blocks: list[list[str]] = []
    for line in log.splitlines():
        if _MESSAGE.match(line) or not blocks:
            blocks.append([])
        blocks[-1].append(line)
    errors = [block for block in blocks if _ERROR.search(block[0])] or blocks
    lines = [line for block in errors[:_MAX_ERRORS] for line in block[:_MAX_LINES_PER_ERROR] if line.strip()]
    if len(errors) > _MAX_ERRORS:
        lines.append(f"({len(errors) - _MAX_ERRORS} more)")
    return "\n".join(lines)
