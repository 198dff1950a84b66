"""Linking with NVSHMEM: which wheel is taken, what nvJitLink is asked for, and what is said when it refuses."""

from __future__ import annotations

import importlib.metadata
import sys
import types
import warnings
from pathlib import Path

import pytest
from helpers.nvrtc import compile_cubin, needs_nvshmem

from epcomm.errors import CompileError, MissingDependency
from epcomm.jit import compiler, linker, nvshmem_wheel
from epcomm.jit.compiler import Program, compile_text
from epcomm.jit.linker import link_with_nvshmem, linked_architecture
from epcomm.jit.nvshmem_wheel import NvshmemWheel, find_nvshmem

CU12, CU13 = "nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13"
WHEEL = NvshmemWheel(Path("/nvshmem"), (3, 4, 5))


class FakeNvJitLink(types.ModuleType):
    """What is used of ``cuda.bindings.nvjitlink``; `log` makes `complete` fail with it."""

    class nvJitLinkError(Exception):
        pass

    InputType = types.SimpleNamespace(CUBIN="cubin", LIBRARY="library", OBJECT="object")

    def __init__(self, version=(13, 0)) -> None:
        self.calls: list[tuple] = []
        self.num_open = 0
        self.log: str | None = None
        self.installed = version

    def version(self):
        return self.installed

    def create(self, count, options):
        self.calls.append(("create", count, options))
        self.num_open += 1
        return "linker"

    def add_data(self, linker, kind, data, num_bytes, name):
        self.calls.append((kind, data, num_bytes, name))

    def add_file(self, linker, kind, path):
        self.calls.append((kind, path))

    def complete(self, linker):
        if self.log is not None:
            raise self.nvJitLinkError("ERROR_INTERNAL (5)")

    def get_linked_cubin_size(self, linker):
        return 6

    def get_linked_cubin(self, linker, target):
        target[:] = b"linked"

    def get_error_log_size(self, linker):
        return len(self.log) + 1

    def get_error_log(self, linker, target):
        target[:] = self.log.encode() + b"\0"

    def destroy(self, linker):
        self.num_open -= 1


@pytest.fixture
def nvjitlink(monkeypatch):
    fake = FakeNvJitLink()
    monkeypatch.setitem(sys.modules, "cuda", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.SimpleNamespace(nvjitlink=fake))
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvjitlink", fake)
    linker.nvjitlink_version.cache_clear()
    yield fake
    linker.nvjitlink_version.cache_clear()


# -- the linker ---------------------------------------------------------------------------------------------------


def test_a_cubin_is_linked_with_the_device_library(nvjitlink):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert link_with_nvshmem(b"cubin", "kernels/a.cu", "90", WHEEL) == b"linked"
    assert nvjitlink.calls == [
        ("create", 1, ["-arch=sm_90"]),
        ("cubin", b"cubin", 5, "kernels/a.cu"),
        ("library", "/nvshmem/lib/libnvshmem_device.a"),
    ]
    assert nvjitlink.num_open == 0


def test_undefined_symbols_are_named(nvjitlink):
    nvjitlink.log = "\n".join(
        f"ERROR 4 in nvlink: Undefined reference to '{name}' in 'kernels/a.cu'" for name in ("_Z3putv", "_Z3getv") * 2
    )
    with pytest.raises(CompileError, match=r"^kernels/a\.cu, linked: got undefined symbols _Z3putv, _Z3getv, from "):
        link_with_nvshmem(b"cubin", "kernels/a.cu", "90", WHEEL)
    assert nvjitlink.num_open == 0


@pytest.mark.parametrize(("log", "shown"), [("a\n\nb", "a\nb\n"), ("", r"ERROR_INTERNAL \(5\)")])
def test_a_refusal_has_the_log_and_the_versions(log, shown, nvjitlink):
    nvjitlink.log = log
    with pytest.raises(CompileError, match=rf"nvJitLink 13.0 and NVSHMEM 3.4.5:\n{shown}") as caught:
        link_with_nvshmem(b"cubin", "a.cu", "90", WHEEL)
    assert caught.value.options == ["-arch=sm_90"]
    assert caught.value.log == (log or "ERROR_INTERNAL (5)")


@pytest.mark.parametrize(
    ("version", "architecture", "warns"), [((12, 9), "90a", 0), ((12, 9), "100", 1), ((13, 0), "120", 0)]
)
def test_a_slow_link_is_announced(version, architecture, warns, nvjitlink):
    nvjitlink.installed = version
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        link_with_nvshmem(b"cubin", "a.cu", architecture, WHEEL)
    assert ["takes minutes with CUDA 12" in str(warning.message) for warning in caught] == [True] * warns


def test_architectures_without_code_run_an_older_one():
    assert {name: linked_architecture(name) for name in ("80", "90a", "100", "103", "120")} == {
        "80": "80",
        "90a": "90a",
        "100": "100",
        "103": "100",
        "120": "120",
    }


def test_without_nvjitlink(monkeypatch, nvjitlink):
    def version():
        raise RuntimeError("Failure finding libnvJitLink\nmore")

    nvjitlink.version = version
    with pytest.raises(MissingDependency, match=r"^nvJitLink: got Failure finding libnvJitLink; .*epcomm\[cuda13,nvsh"):
        link_with_nvshmem(b"cubin", "a.cu", "90", WHEEL)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependency, match=r"^cuda-bindings: .*pip install"):
        link_with_nvshmem(b"cubin", "a.cu", "90", WHEEL)


# -- programs -----------------------------------------------------------------------------------------------------


def test_programs_with_nvshmem_are_others():
    plain, linked = Program("a.cu", (("N", "1"),)), Program("a.cu", (("N", "1"),), nvshmem=True)
    assert plain != linked
    assert (str(plain), str(linked)) == ("a.cu -DN=1", "a.cu -DN=1 (with NVSHMEM)")


@pytest.fixture
def tools(monkeypatch, nvjitlink):
    """NVRTC is played by a function: calls are (name, file, options)."""
    calls: list[tuple] = []

    def compile_one(text, name, options, file=""):
        calls.append((name, file, options))
        return b"relocatable"

    monkeypatch.setattr(compiler, "_compile", compile_one)
    monkeypatch.setattr(compiler, "header_folders", lambda: (Path("/cuda"),))
    monkeypatch.setattr(compiler, "installed_nvshmem", lambda: WHEEL)
    return calls


def test_options_with_nvshmem(tools, nvjitlink, monkeypatch):
    monkeypatch.setenv("EPCOMM_CUDA_SRC", str(compiler.cuda_src_dir()))
    assert compile_text("", "kernels/a.cu", "103", nvshmem=True) == b"linked"
    ((name, file, options),) = tools
    assert (name, file) == ("kernels/a.cu", str(compiler.cuda_src_dir() / "kernels/a.cu"))
    assert {"-arch=sm_100", "-rdc=true", "-default-device", "-I/nvshmem/include", "-ftz=false"} <= set(options)
    assert options[-2:] == ["-I/cuda", "-I/nvshmem/include"]
    assert "-no-source-include" not in options
    assert nvjitlink.calls[0] == ("create", 1, ["-arch=sm_100"])


def test_programs_without_nvshmem_never_ask_for_it(tools, nvjitlink, monkeypatch):
    monkeypatch.setattr(compiler, "installed_nvshmem", lambda: pytest.fail("asked for NVSHMEM"))
    assert compile_text("", "kernels/a.cu", "103") == b"relocatable"
    ((_, file, options),) = tools
    assert file == ""
    assert {"-arch=sm_103", "-no-source-include"} <= set(options)
    assert not [
        option for option in options if "rdc" in option or "default-device" in option or "/nvshmem/inc" in option
    ]
    assert nvjitlink.calls == []


@needs_nvshmem
def test_a_missing_function_is_named():
    source = '#include "transport/nvshmem.cuh"\n__device__ void absent();\n__global__ void probe() { absent(); }\n'
    with pytest.raises(CompileError, match=r"undefined symbols \S*absent\S*, from nvJitLink \d+\.\d+ and NVSHMEM 3\."):
        compile_cubin(source, "90", nvshmem=True)


# -- the wheel ----------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages: ``site("nvidia-nvshmem-cu13", "3.4.5")`` installs one."""
    folder = tmp_path / "nvidia" / "nvshmem"
    installed: set[str] = set()

    def install(name: str, version: str = "3.4.5", without: str = "") -> Path:
        installed.add(name)
        major, minor, patch = version.split(".")
        header = "".join(
            f"#define NVSHMEM_VENDOR_{part}_VERSION {number}\n"
            for part, number in (("MAJOR", major), ("MINOR", minor), ("PATCH", patch), ("PACKAGE", 0))
        )
        files = {
            "include/non_abi/nvshmem_version.h": header,
            "lib/libnvshmem_device.a": "",
            "lib/libnvshmem_host.so.3": "",
        }
        for path, text in files.items():
            if not without or without not in path:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text)
        return folder

    def distribution(name: str):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return types.SimpleNamespace(locate_file=lambda path: tmp_path / path)

    monkeypatch.setattr(nvshmem_wheel.importlib.metadata, "distribution", distribution)
    find_nvshmem.cache_clear()
    yield install
    find_nvshmem.cache_clear()


def test_the_wheel_of_the_compilers_cuda_is_found(site):
    folder = site("nvidia-nvshmem-cu13", "3.12.1")
    wheel = find_nvshmem(13)
    assert wheel == NvshmemWheel(folder, (3, 12, 1))
    assert str(wheel) == "NVSHMEM 3.12.1"
    assert (wheel.headers, wheel.host_library) == (folder / "include", folder / "lib" / "libnvshmem_host.so.3")


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        ([], r"got none; wanted the package nvidia-nvshmem-cu12; pip install 'epcomm\[cuda12,nvshmem12\]'$"),
        (
            [("nvidia-nvshmem-cu13",)],
            "got nvidia-nvshmem-cu13 beside a compiler of CUDA 12; wanted the package nvidia-",
        ),
        (
            [("nvidia-nvshmem-cu12",), ("nvidia-nvshmem-cu13",)],
            "wanted one of them; pip uninstall -y nvidia-nvshmem-cu12 ",
        ),
        ([("nvidia-nvshmem-cu12", "3.3.20")], "got 3.3.20; wanted 3.4.5 or newer; pip install .* --upgrade$"),
        (
            [("nvidia-nvshmem-cu12", "3.4.5", "device.a")],
            r"without libnvshmem_device\.a; pip install --force-reinstall",
        ),
        ([("nvidia-nvshmem-cu12", "3.4.5", "version.h")], "without its version header"),
    ],
    ids=["none", "other_cuda", "two", "old", "no_library", "no_header"],
)
def test_what_is_wrong_with_the_wheel(packages, words, site):
    for package in packages:
        site(*package)
    with pytest.raises(MissingDependency, match=f"^NVSHMEM: .*{words}"):
        find_nvshmem(12)
