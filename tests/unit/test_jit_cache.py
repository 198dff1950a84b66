"""Cubins are compiled once: the disk cache, whom it trusts, and how ranks share. NVRTC is played by a function."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from helpers.nvrtc import needs_nvrtc

import epcomm
from epcomm import run_local
from epcomm.bootstrap import SoloCommunicator
from epcomm.errors import BootstrapError, CompileError, RankMismatch
from epcomm.jit import cache, sharing
from epcomm.jit.cache import DiskCache, cached_cubin, user_folder
from epcomm.jit.compiler import Program
from epcomm.jit.nvshmem_wheel import NvshmemWheel
from epcomm.jit.sharing import share_cubins

DISPATCH, COMBINE = Program("kernels/dispatch.cu"), Program("kernels/combine.cu", (("N", "8"),))


class FakeCompiler:
    """Counts what it is asked for; `error` is raised instead of a result."""

    def __init__(self) -> None:
        self.calls: list[tuple[Program, str, str]] = []
        self.error: Exception | None = None

    def __call__(self, program: Program, architecture: str) -> bytes:
        self.calls.append((program, architecture, threading.current_thread().name))
        if self.error is not None:
            raise self.error
        return f"{program} for sm_{architecture}".encode()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A fresh process, so to speak, with a cache folder and sources of its own."""
    fake = FakeCompiler()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.cuh").write_text("// 1\n")
    monkeypatch.setenv("EPCOMM_CUDA_SRC", str(tmp_path / "src"))
    monkeypatch.setenv("EPCOMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_held", {})
    monkeypatch.setattr(cache, "compile_program", fake)
    monkeypatch.setattr(cache, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(cache, "header_folders", lambda: ())
    monkeypatch.setattr(
        cache, "compiler_options", lambda architecture, defines, **_: [architecture, *map("=".join, defines)]
    )
    cache._warn_once.cache_clear()
    return fake


def new_process(monkeypatch):
    monkeypatch.setattr(cache, "_held", {})


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.cubin"))


# -- the disk cache -----------------------------------------------------------------------------------------------


def test_stored_entries_are_loaded(tmp_path):
    disk = DiskCache(tmp_path / "a" / "b")
    assert disk.load("k") is None
    disk.store("k", b"payload")
    disk.store("l", b"")
    assert (disk.load("k"), disk.load("l"), disk.load("m")) == (b"payload", b"", None)
    disk.store("k", b"other")
    assert disk.load("k") == b"other"
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["k.cubin", "l.cubin"]
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "longer", "of_another_key", "a_folder"])
def test_a_damaged_entry_is_none_and_can_be_replaced(damage, tmp_path):
    disk = DiskCache(tmp_path)
    disk.store("k", b"payload of k")
    disk.store("other", b"payload of other")
    path = tmp_path / "k.cubin"
    data = path.read_bytes()
    if damage == "a_folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {
                "truncated": data[:-1],
                "flipped": data[:-1] + bytes([data[-1] ^ 1]),
                "empty": b"",
                "longer": data + b"\0",
                "of_another_key": (tmp_path / "other.cubin").read_bytes(),
            }[damage]
        )
    assert disk.load("k") is None
    disk.store("k", b"payload of k")
    assert disk.load("k") == (None if damage == "a_folder" else b"payload of k")
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_is_ignored_with_one_warning(mode, tmp_path):
    disk = DiskCache(tmp_path)
    disk.store("k", b"payload")
    tmp_path.chmod(mode)
    cache._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="others may write to it"):
        assert disk.load("k") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disk.store("l", b"payload")
        assert DiskCache(tmp_path).load("k") is None
    assert not (tmp_path / "l.cubin").exists()
    tmp_path.chmod(0o755)
    assert disk.load("k") == b"payload"


def test_a_folder_of_another_user_is_ignored(tmp_path, monkeypatch):
    disk = DiskCache(tmp_path)
    disk.store("k", b"payload")
    cache._warn_once.cache_clear()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(RuntimeWarning, match="does not belong to this user"):
        assert disk.load("k") is None


def test_an_entry_that_others_may_write_is_ignored(tmp_path):
    disk = DiskCache(tmp_path)
    disk.store("k", b"payload")
    (tmp_path / "k.cubin").chmod(0o666)
    assert disk.load("k") is None


def test_the_entries_that_were_not_used_for_longest_go_first(tmp_path):
    disk = DiskCache(tmp_path, max_bytes=4000)
    for age, key in enumerate("dcba"):
        disk.store(key, bytes(900))
        os.utime(tmp_path / f"{key}.cubin", (0, 10**9 - age))  # d is the newest so far
    assert disk.load("a") is not None  # used, so it is the newest now
    disk.store("e", bytes(900))
    assert [path.stem for path in entries(tmp_path)] == ["a", "c", "d", "e"]
    disk.store("f", bytes(5000))
    assert [path.stem for path in entries(tmp_path)] == ["f"]


def test_left_overs_of_processes_that_died_are_removed(tmp_path):
    disk = DiskCache(tmp_path)
    old, new, foreign = (tmp_path / name for name in ("old.unfinished", "new.unfinished", "foreign.txt"))
    for path in (old, new, foreign):
        path.write_bytes(b"x")
    for path in (old, foreign):
        os.utime(path, (0, time.time() - 7200))
    disk.store("k", b"payload")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.txt", "k.cubin", "new.unfinished"]


@pytest.mark.parametrize("obstacle", ["a_file_is_there", "below_a_file", "full"])
def test_where_nothing_can_be_written_nothing_happens(obstacle, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    if obstacle == "a_file_is_there":
        folder.write_text("")
    elif obstacle == "below_a_file":
        (tmp_path / "file").write_text("")
        folder = tmp_path / "file" / "cache"
    else:

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        disk = DiskCache(folder)
        disk.store("k", b"payload")
        assert disk.load("k") is None
    assert obstacle != "full" or list(folder.iterdir()) == []


def test_several_writers_and_readers_at_once(tmp_path):
    """Small enough a cap that entries are evicted all the time; a reader sees a whole entry or none."""
    payloads = {f"k{n}": bytes([n]) * 5000 for n in range(4)}
    problems = []

    def work() -> None:
        disk = DiskCache(tmp_path, max_bytes=12000)
        for _ in range(20):
            for key, payload in payloads.items():
                disk.store(key, payload)
                if disk.load(key) not in (payload, None):
                    problems.append(key)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert not list(tmp_path.glob("*.unfinished"))


def test_the_folder_of_the_user(monkeypatch):
    monkeypatch.delenv("EPCOMM_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_folder() == Path("/home/somebody/.cache/epcomm")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_folder() == Path("/home/somebody/.cache/epcomm")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert user_folder() == Path("/caches/epcomm")
    monkeypatch.setenv("EPCOMM_CACHE_DIR", "/chosen")
    assert user_folder() == Path("/chosen")
    monkeypatch.delenv("EPCOMM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user whom nobody knows
    assert user_folder() is None


# -- what is compiled ---------------------------------------------------------------------------------------------


def test_each_program_is_compiled_once(compiler, tmp_path, monkeypatch):
    first = cached_cubin(DISPATCH, "90")
    assert first == b"kernels/dispatch.cu for sm_90"
    assert cached_cubin(DISPATCH, "90") is first
    new_process(monkeypatch)
    assert cached_cubin(DISPATCH, "90") == first
    assert len(compiler.calls) == 1
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize("change", ["source", "defines", "architecture", "header", "nvrtc", "options"])
def test_what_a_cubin_depends_on_is_in_its_key(change, compiler, tmp_path, monkeypatch):
    program, architecture = Program("a.cu", (("N", "1"),)), "90"
    cached_cubin(program, architecture)
    new_process(monkeypatch)
    if change == "source":
        program = Program("b.cu", program.defines)
    elif change == "defines":
        program = Program("a.cu", (("N", "2"),))
    elif change == "architecture":
        architecture = "80"
    elif change == "header":
        (tmp_path / "src" / "a.cuh").write_text("// 12\n")
    elif change == "nvrtc":
        monkeypatch.setattr(cache, "nvrtc_version", lambda: (13, 1))
    else:
        monkeypatch.setattr(cache, "compiler_options", lambda architecture, defines, **_: ["-other"])
    cached_cubin(program, architecture)
    assert len(compiler.calls) == 2


@pytest.fixture
def nvshmem(tmp_path, monkeypatch):
    """A wheel whose device library can be edited."""
    wheel = NvshmemWheel(tmp_path / "nvshmem", (3, 4, 5))
    wheel.device_library.parent.mkdir(parents=True)
    wheel.device_library.write_text("library")
    monkeypatch.setattr(cache, "installed_nvshmem", lambda: wheel)
    monkeypatch.setattr(cache, "nvjitlink_version", lambda: (13, 0))
    return wheel


@pytest.mark.parametrize("change", ["linked", "version", "library", "linker"])
def test_what_a_linked_cubin_depends_on_is_in_its_key(change, compiler, nvshmem, monkeypatch):
    program = Program("a.cu", nvshmem=True)
    for _ in range(2):
        cached_cubin(program, "90")
        new_process(monkeypatch)
    assert len(compiler.calls) == 1
    if change == "linked":
        program = Program("a.cu")
    elif change == "version":
        monkeypatch.setattr(cache, "installed_nvshmem", lambda: NvshmemWheel(nvshmem.folder, (3, 5, 0)))
    elif change == "library":
        nvshmem.device_library.write_text("another library")
    else:
        monkeypatch.setattr(cache, "nvjitlink_version", lambda: (13, 1))
    cached_cubin(program, "90")
    assert len(compiler.calls) == 2


def test_other_programs_do_not_ask_for_nvshmem(compiler, monkeypatch):
    for name in ("installed_nvshmem", "nvjitlink_version"):
        monkeypatch.setattr(cache, name, lambda: pytest.fail("asked for NVSHMEM"))
    cached_cubin(DISPATCH, "90")


def test_an_edit_is_seen_by_a_running_process(compiler, tmp_path):
    cached_cubin(DISPATCH, "90")
    (tmp_path / "src" / "a.cuh").write_text("// another size\n")
    cached_cubin(DISPATCH, "90")
    assert len(compiler.calls) == 2


def test_a_corrupt_entry_is_compiled_again_and_replaced(compiler, tmp_path, monkeypatch):
    good = cached_cubin(DISPATCH, "90")
    (path,) = entries(tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:-3])
    for num_compiled in (2, 2):
        new_process(monkeypatch)
        assert cached_cubin(DISPATCH, "90") == good
        assert len(compiler.calls) == num_compiled


def test_sources_that_are_being_edited_are_not_kept(compiler, tmp_path, monkeypatch):
    def edit_meanwhile(program, architecture):
        (tmp_path / "src" / "a.cuh").write_text("// edited while NVRTC was reading\n")
        return b"of one version or the other"

    monkeypatch.setattr(cache, "compile_program", edit_meanwhile)
    cached_cubin(DISPATCH, "90")
    assert entries(tmp_path / "cache") == []


def test_without_a_folder(compiler, monkeypatch):
    monkeypatch.setattr(cache, "user_folder", lambda: None)
    for _ in range(2):
        new_process(monkeypatch)
        assert cached_cubin(DISPATCH, "90") == b"kernels/dispatch.cu for sm_90"
    assert len(compiler.calls) == 2


@pytest.mark.slow
@needs_nvrtc
def test_two_processes_with_one_cache(tmp_path):
    program = """
import sys
from epcomm.jit import cache, compiler
from epcomm.jit.compiler import Program
from epcomm.jit.nvshmem_wheel import NvshmemWheel
compile_program = compiler.compile_program
def count(program, architecture):
    print("compiled")
    return compile_program(program, architecture)
cache.compile_program = count
assert cache.cached_cubin(Program("probe.cu"), "90").startswith(bytes([127]) + b"ELF")
"""
    (tmp_path / "probe.cu").write_text('extern "C" __global__ void probe() {}\n')
    changes = {
        "EPCOMM_CUDA_SRC": str(tmp_path),
        "EPCOMM_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(epcomm.__file__).parents[1]),
    }
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, **changes}, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert outputs == ["compiled\n", ""]


# -- sharing between ranks ----------------------------------------------------------------------------------------


class SeparateMemory(dict):
    """What the process of each rank holds: ranks that are threads would otherwise find what another one compiled."""

    def _own(self) -> dict:
        return self.setdefault(threading.current_thread().name, {})

    def get(self, key, default=None):
        return self._own().get(key, default)

    def __setitem__(self, key, value):
        if isinstance(key, tuple):
            self._own()[key] = value
        else:
            super().__setitem__(key, value)


class InThisThread:
    """Stands for the ThreadPoolExecutor, whose threads would have a memory of their own."""

    def __init__(self, *_) -> None:
        self.map = map

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        return None


@pytest.fixture
def separate_memory(compiler, monkeypatch):
    memory = SeparateMemory()
    monkeypatch.setattr(sharing, "ThreadPoolExecutor", InThisThread)
    monkeypatch.setattr(cache, "_held", memory)
    monkeypatch.setattr(cache, "user_folder", lambda: None)
    return memory


def test_one_rank_of_a_host_compiles_for_all(compiler, separate_memory):
    hosts, architectures = ["a", "a", "b", "b", "b"], ["90", "90", "90", "80", "90"]

    def program(comm):
        got = share_cubins(comm, hosts, [DISPATCH, COMBINE, DISPATCH], architectures[comm.rank])
        assert list(got) == [DISPATCH, COMBINE]
        return {str(p): cubin.decode() for p, cubin in got.items()}

    results = run_local(5, program)
    for architecture, result in zip(architectures, results, strict=True):
        assert result == {str(p): f"{p} for sm_{architecture}" for p in (DISPATCH, COMBINE)}
    compiled = sorted((str(p), architecture) for p, architecture, _ in compiler.calls)
    # Hosts a and b for sm_90, host b for sm_80.
    assert compiled == sorted((str(p), a) for p in (DISPATCH, COMBINE) for a in ("90", "90", "80"))


def test_ranks_may_need_different_programs_and_nothing_is_compiled_twice(compiler, separate_memory):
    def program(comm):
        wanted = [DISPATCH] if comm.rank == 0 else [COMBINE]
        first = share_cubins(comm, ["h"] * 2, wanted, "90")
        again = share_cubins(comm, ["h"] * 2, wanted, "90")
        assert first == again
        return sorted(map(str, first))

    assert run_local(2, program) == [[str(DISPATCH)], [str(COMBINE)]]
    assert len(compiler.calls) == 2


def test_a_single_rank(compiler):
    assert share_cubins(SoloCommunicator(), ["h"], [DISPATCH], "90") == {DISPATCH: b"kernels/dispatch.cu for sm_90"}
    assert share_cubins(SoloCommunicator(), ["h"], [], "90") == {}


@pytest.mark.parametrize(
    ("error", "wanted", "message"),
    [
        (CompileError("a.cu", got="line 1", do="x", log="all of it"), CompileError, "^a.cu: got line 1; x"),
        (RankMismatch("x", {"y": [1, 2]}), BootstrapError, "^kernels: got RankMismatch on rank 0: x: got y = 1"),
        (ZeroDivisionError("oops"), BootstrapError, "^kernels: got ZeroDivisionError on rank 0: oops; look at"),
    ],
    ids=["compile_error", "with_its_own_constructor", "not_ours"],
)
def test_an_error_on_one_rank_is_raised_on_all(error, wanted, message, compiler, separate_memory):
    compiler.error = error

    def program(comm):
        try:
            share_cubins(comm, ["h"] * 3, [DISPATCH], "90")
        except Exception as raised:
            comm.barrier()  # the communicator is still in step
            return raised
        return None

    raised = run_local(3, program)
    assert raised[0] is error
    for other in raised[1:]:
        assert type(other) is wanted
        with pytest.raises(wanted, match=message):
            raise other
    assert len({id(other) for other in raised}) == 3
    if wanted is CompileError:
        assert raised[1].log == "all of it"
        assert raised[1].__notes__ == ["raised on rank 0"]
