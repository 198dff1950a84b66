"""Every CUDA source compiles with NVRTC alone, for every architecture that is supported: headers also by themselves."""

import importlib
import importlib.util

import pytest
from helpers.nvrtc import compile_cubin, needs_nvrtc

from epcomm.errors import CompileError
from epcomm.jit.compiler import compile_program
from epcomm.jit.source import cuda_src_dir, source_files

ARCHITECTURES = ("80", "90", "100")


def programs() -> tuple:
    """What the package compiles at run time."""
    if importlib.util.find_spec("epcomm.kernels") is None:
        return ()
    kernels = importlib.import_module("epcomm.kernels")
    return (*kernels.PROGRAMS, *kernels.LOW_LATENCY_PROGRAMS)


def test_sources_are_found() -> None:
    assert "common/numerics.cuh" in [path.as_posix() for path in source_files()]


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("path", [path.as_posix() for path in source_files() if path.suffix == ".cuh"])
def test_header_compiles(path: str, architecture: str) -> None:
    cubin = compile_cubin(f'#include "{path}"\nextern "C" __global__ void probe() {{}}\n', architecture)
    assert cubin.startswith(b"\x7fELF")


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("program", programs(), ids=str)
def test_program_compiles(program, architecture: str) -> None:
    assert compile_program(program, architecture).startswith(b"\x7fELF")


def test_every_program_file_is_compiled() -> None:
    files = {path.as_posix() for path in source_files() if path.suffix == ".cu"}
    if importlib.util.find_spec("epcomm.kernels") is not None:
        assert {program.source for program in programs()} == files


@needs_nvrtc
def test_a_mistake_is_reported() -> None:
    with pytest.raises(CompileError, match="no_such_function"):
        compile_cubin('#include "common/numerics.cuh"\n__global__ void probe() { no_such_function(); }\n', "90")


def test_inline_assembly_lives_in_one_folder() -> None:
    for path in source_files():
        if path.parts[0] != "ptx":
            assert "asm" not in (cuda_src_dir() / path).read_text().split(), path
