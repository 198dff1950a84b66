"""Probes of the NVIDIA driver, the GPUs and MPS, through the driver library alone (no CuPy, no nvidia-smi)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from epcomm import env
from epcomm.cli.doctor.findings import Finding

__all__ = ["Driver", "DriverError", "driver_cuda_major", "load_driver", "probe_gpu", "probe_mps"]

_MIN_CAPABILITY = (8, 0)
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE

# CUdevice_attribute, CUdevice_P2PAttribute and CUcomputemode of cuda.h
_ATTRIBUTE_NUM_SMS, _ATTRIBUTE_COMPUTE_MODE, _ATTRIBUTE_MAJOR, _ATTRIBUTE_MINOR = 16, 20, 75, 76
_ATTRIBUTE_DMA_BUF_SUPPORTED = 124
_P2P_NATIVE_ATOMICS = 3
_MODE_PROHIBITED, _MODE_EXCLUSIVE_PROCESS = 2, 3

_NO_GPU = "no GPU: the host backend will be used"
_MPS_QUERY_S = 5.0
_START = "epcomm run --mps has it for a job, bench and demo by themselves; to keep it: nvidia-cuda-mps-control -d"
_SLOW = "several ranks on one GPU without MPS are correct, but about 3000 times slower"


class DriverError(Exception):
    """A call of the driver library failed; `code` is its CUresult."""

    def __init__(self, function: str, code: int, name: str) -> None:
        self.code = code
        super().__init__(f"{function} failed: {name} ({code})")


@dataclass(frozen=True)
class Gpu:
    """What the driver says about one device."""

    name: str
    capability: tuple[int, int]
    num_sms: int
    memory_bytes: int
    compute_mode: int

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} (sm_{major}{minor}, {self.num_sms} SMs, {self.memory_bytes / (1 << 30):.0f} GiB)"


class Driver:
    """The few calls of libcuda that need no context."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def _call(self, function: str, *arguments: Any) -> None:
        if code := getattr(self._library, function)(*arguments):
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise DriverError(function, code, (text.value or b"unknown error").decode())

    def _int(self, function: str, *arguments: int) -> int:
        value = ctypes.c_int()
        self._call(function, ctypes.byref(value), *arguments)
        return value.value

    def cuda_version(self) -> tuple[int, int]:
        """The newest CUDA this driver supports, (major, minor); needs no GPU."""
        version = self._int("cuDriverGetVersion")
        return version // 1000, version % 1000 // 10

    def gpus(self) -> list[Gpu]:
        """All devices that this process may see; an empty list when there is none."""
        try:
            self._call("cuInit", 0)
            return [self._gpu(index) for index in range(self._int("cuDeviceGetCount"))]
        except DriverError as error:
            if error.code == _NO_DEVICE:
                return []
            raise

    def _gpu(self, index: int) -> Gpu:
        device = self._int("cuDeviceGet", index)
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        self._call("cuDeviceGetName", name, len(name), device)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)

        def attribute(number: int) -> int:
            return self._int("cuDeviceGetAttribute", number, device)

        return Gpu(
            name=name.value.decode(errors="replace"),
            capability=(attribute(_ATTRIBUTE_MAJOR), attribute(_ATTRIBUTE_MINOR)),
            num_sms=attribute(_ATTRIBUTE_NUM_SMS),
            memory_bytes=memory.value,
            compute_mode=attribute(_ATTRIBUTE_COMPUTE_MODE),
        )

    def has_dma_buf(self, index: int) -> bool:
        """Whether memory of that device can be given to other devices as a dma_buf, which NICs register."""
        return bool(self._int("cuDeviceGetAttribute", _ATTRIBUTE_DMA_BUF_SUPPORTED, self._int("cuDeviceGet", index)))

    def link(self, source: int, target: int) -> str:
        """How device `source` reaches the memory of `target`; only NVLink has native remote atomics."""
        first, second = self._int("cuDeviceGet", source), self._int("cuDeviceGet", target)
        if not self._int("cuDeviceCanAccessPeer", first, second):
            return "no peer access"
        return "NVLink" if self._int("cuDeviceGetP2PAttribute", _P2P_NATIVE_ATOMICS, first, second) else "PCIe"


def load_driver() -> Driver | None:
    """The driver library, None where there is no NVIDIA driver."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"))
    except OSError:
        return None


def driver_cuda_major() -> int:
    """Major version of the newest CUDA the driver supports, 0 without a usable driver."""
    driver = load_driver()
    try:
        return driver.cuda_version()[0] if driver else 0
    except DriverError:
        return 0


def probe_gpu() -> list[Finding]:
    """The driver, the GPUs, and the links between them."""
    driver = load_driver()
    if driver is None:
        return [
            Finding("driver", "missing", "no NVIDIA driver (libcuda.so.1)"),
            Finding("gpu", "missing", _NO_GPU),
        ]
    try:
        major, minor = driver.cuda_version()
        version = Finding("driver", "ok", f"supports CUDA {major}.{minor}")
        gpus = driver.gpus()
    except DriverError as error:
        advice = "restart the machine if the driver was just updated; in a container look at its --gpus option"
        return [Finding("driver", "FAIL", str(error), advice), Finding("gpu", "missing", _NO_GPU)]
    if not gpus:
        visible = env.lookup("CUDA_VISIBLE_DEVICES")
        reason = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        return [version, Finding("gpu", "missing", _NO_GPU + reason)]
    return [version, _judge_gpus(gpus), *_judge_links(driver, len(gpus))]


def _judge_gpus(gpus: list[Gpu]) -> Finding:
    text = ", ".join(f"{count} x {name}" for name, count in Counter(map(str, gpus)).items())
    if any(gpu.capability < _MIN_CAPABILITY for gpu in gpus):
        wanted = ".".join(map(str, _MIN_CAPABILITY))
        return Finding(
            "gpu", "FAIL", text, f"needs compute capability {wanted}: hide older GPUs (CUDA_VISIBLE_DEVICES)"
        )
    if any(gpu.compute_mode == _MODE_PROHIBITED for gpu in gpus):
        return Finding("gpu", "FAIL", f"{text}, compute mode prohibited", "nvidia-smi -c DEFAULT")
    if any(gpu.compute_mode == _MODE_EXCLUSIVE_PROCESS for gpu in gpus):
        text += ", compute mode exclusive-process: one rank a GPU unless MPS runs"
        return Finding("gpu", "warn", text, "nvidia-smi -c DEFAULT")
    return Finding("gpu", "ok", text)


def _judge_links(driver: Driver, num_gpus: int) -> Iterator[Finding]:
    """One line about all pairs; nothing for a single GPU."""
    if num_gpus < 2:
        return
    try:
        links = {pair: driver.link(*pair) for pair in permutations(range(num_gpus), 2)}
    except DriverError as error:
        yield Finding("gpu links", "FAIL", str(error), "nvidia-smi topo -p2p rw")
        return
    kinds = Counter(links.values())
    text = ", ".join(f"{count} of {len(links)} pairs {kind}" for kind, count in kinds.most_common())
    if apart := [f"{source}->{target}" for (source, target), kind in links.items() if kind == "no peer access"]:
        shown = ", ".join(apart[:6]) + (", ..." if len(apart) > 6 else "")
        yield Finding(
            "gpu links", "warn", f"{text} ({shown})", "nvidia-smi topo -p2p rw; look at IOMMU and ACS settings"
        )
    else:
        yield Finding("gpu links", "ok", text)


def probe_mps() -> list[Finding]:
    """Whether the Multi-Process Service runs for this user, and whether that matters here."""
    driver = load_driver()
    try:
        num_gpus = len(driver.gpus()) if driver else 0
    except DriverError:
        num_gpus = 0
    if num_gpus == 0:
        return [Finding("mps", "ok", "not needed without a GPU")]
    configured = env.lookup("CUDA_MPS_PIPE_DIRECTORY")
    pipes = Path(configured or "/tmp/nvidia-mps")
    control = shutil.which("nvidia-cuda-mps-control")
    start = _START if control else "install nvidia-cuda-mps-control (it comes with the driver)"
    if _mps_answers(control, pipes):
        return [Finding("mps", "ok", f"running ({pipes})")]
    if configured:
        return [Finding("mps", "warn", f"not running, although CUDA_MPS_PIPE_DIRECTORY={configured}; {_SLOW}", start)]
    if num_gpus == 1:
        return [Finding("mps", "warn", f"not running; {_SLOW}", start)]
    return [Finding("mps", "ok", f"not running, not needed with one rank a GPU; {_SLOW}")]


def _mps_answers(control: str | None, pipes: Path) -> bool:
    """Asks the control daemon; where its program is not at hand (containers), looks at its process."""
    if control is None:
        try:
            os.kill(int((pipes / "nvidia-cuda-mps-control.pid").read_text()), 0)
        except PermissionError:  # another user's process: alive
            return True
        except (OSError, ValueError):
            return False
        return True
    query = "get_server_list\n"
    try:
        answer = subprocess.run(
            [control], input=query, text=True, capture_output=True, timeout=_MPS_QUERY_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0
