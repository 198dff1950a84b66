"""Every CUDA source compiles with NVRTC alone, for every architecture that is supported: headers also by themselves.

What includes NVSHMEM is linked with it, too.
"""

import importlib
import importlib.util
import re

import pytest
from helpers.elf import symbols
from helpers.nvrtc import NVSHMEM_ARCHITECTURES, compile_cubin, needs_nvrtc, needs_nvshmem

from epcomm.errors import CompileError
from epcomm.jit.compiler import compile_program, nvshmem_version
from epcomm.jit.source import cuda_src_dir, source_files

ARCHITECTURES = ("80", "90", "100")


# Headers of NVSHMEM, which one file of ours includes.
NVSHMEM_HEADER = re.compile(r"#\s*include\s*<(nvshmem|device/|device_host|non_abi/|host/|bootstrap_)")
# What the driver or the runtime of the device provides.
PROVIDED = re.compile(r"vprintf|__assertfail|\.nv\.reservedSmem\..*")


def programs(*, nvshmem: bool) -> tuple:
    """What the package compiles at run time: with NVSHMEM, or without."""
    if importlib.util.find_spec("epcomm.kernels") is None:
        return ()
    kernels = importlib.import_module("epcomm.kernels")
    names = ("PROGRAMS", "INTERNODE_PROGRAMS", "LOW_LATENCY_PROGRAMS", "BENCH_PROGRAMS", "NVSHMEM_PROGRAMS")
    found = [program for name in names for program in getattr(kernels, name)]
    return tuple(program for program in found if program.nvshmem == nvshmem)


# What only programs that talk to other nodes have.
OVER_NETWORK = re.compile(r"^#if KERNEL_NVSHMEM$(.*?)^#(else|endif)$", re.MULTILINE | re.DOTALL)


def includes(path: str, defines: tuple[tuple[str, str], ...] = ()) -> set[str]:
    """The files of ours that a file needs when it is compiled with these macros, itself among them."""
    found, left = set(), [path]
    while left:
        found.add(path := left.pop())
        text = (cuda_src_dir() / path).read_text()
        if "KERNEL_NVSHMEM" not in dict(defines):
            text = OVER_NETWORK.sub("", text)
        names = re.findall(r'^#include "(.*)"', text, re.MULTILINE)
        left += [name for name in names if name not in found]
    return found


def headers(*, nvshmem: bool) -> list[str]:
    """The headers that need NVSHMEM, or those that do not."""
    paths = [path.as_posix() for path in source_files() if path.suffix == ".cuh"]
    return [path for path in paths if ("transport/nvshmem.cuh" in includes(path)) == nvshmem]


def assert_is_linked(cubin: bytes) -> None:
    """Nothing is missing in it, and the host library will find what it has to fill."""
    table = {symbol.name: symbol for symbol in symbols(cubin)}
    undefined = [name for name, symbol in table.items() if symbol.is_undefined and not PROVIDED.fullmatch(name)]
    assert undefined == []
    for name in ("nvshmemi_device_state_d", "nvshmemi_device_lib_version_d"):
        symbol = table[name]
        assert (symbol.binding, symbol.kind, symbol.is_undefined) == ("global", "object", False), symbol
        assert symbol.num_bytes > 0


def test_sources_are_found() -> None:
    assert "common/numerics.cuh" in [path.as_posix() for path in source_files()]


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("path", headers(nvshmem=False))
def test_header_compiles(path: str, architecture: str) -> None:
    cubin = compile_cubin(f'#include "{path}"\nextern "C" __global__ void probe() {{}}\n', architecture)
    assert cubin.startswith(b"\x7fELF")


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("program", programs(nvshmem=False), ids=str)
def test_program_compiles(program, architecture: str) -> None:
    assert compile_program(program, architecture).startswith(b"\x7fELF")


@needs_nvshmem
@pytest.mark.parametrize("path", headers(nvshmem=True))
def test_header_compiles_and_links(path: str) -> None:
    source = f'#include "{path}"\nextern "C" __global__ void probe() {{ epcomm::nvshmem::quiet(); }}\n'
    assert_is_linked(compile_cubin(source, "90", nvshmem=True))


@needs_nvshmem
@pytest.mark.parametrize("architecture", NVSHMEM_ARCHITECTURES)
@pytest.mark.parametrize("program", programs(nvshmem=True), ids=str)
def test_program_compiles_and_links(program, architecture: str) -> None:
    assert_is_linked(compile_program(program, architecture))


@needs_nvshmem
def test_kernels_choose_queue_pairs_where_nvshmem_has_them() -> None:
    has_queue_pairs = str(nvshmem_version() >= (3, 5)).lower()
    compile_cubin(
        f'#include "transport/nvshmem.cuh"\nstatic_assert(epcomm::nvshmem::kHasQueuePairs == {has_queue_pairs});\n',
        "90",
        nvshmem=True,
    )


def test_programs_say_whether_they_need_nvshmem() -> None:
    for nvshmem in (False, True):
        for program in programs(nvshmem=nvshmem):
            assert ("transport/nvshmem.cuh" in includes(program.source, program.defines)) == nvshmem, program


def test_one_file_includes_headers_of_nvshmem() -> None:
    files = [path.as_posix() for path in source_files() if NVSHMEM_HEADER.search((cuda_src_dir() / path).read_text())]
    assert files == ["transport/nvshmem.cuh"]


def test_every_program_file_is_compiled() -> None:
    files = {path.as_posix() for path in source_files() if path.suffix == ".cu"}
    if importlib.util.find_spec("epcomm.kernels") is not None:
        assert {program.source for nvshmem in (False, True) for program in programs(nvshmem=nvshmem)} == files


@needs_nvrtc
def test_a_mistake_is_reported() -> None:
    with pytest.raises(CompileError, match="no_such_function"):
        compile_cubin('#include "common/numerics.cuh"\n__global__ void probe() { no_such_function(); }\n', "90")


def test_inline_assembly_lives_in_one_folder() -> None:
    for path in source_files():
        if path.parts[0] != "ptx":
            assert "asm" not in (cuda_src_dir() / path).read_text().split(), path
