"""Probes of what NVSHMEM would need of a host with NICs: its transports, GPUDirect RDMA, NICs worked by GPUs (IBGDA).

Only kernels between hosts need it, so what lacks is missing and no failure. Sources: NVSHMEM's install guide and its
release notes (3.4.5: IBGDA with the help of the CPU), and what the transports of its wheels themselves look for.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path

from epcomm import env
from epcomm.cli.doctor.findings import Finding
from epcomm.cli.doctor.gpu import DriverError, load_driver
from epcomm.cli.doctor.network import Port, rdma_ports, read_text
from epcomm.cli.doctor.packages import find_library

__all__ = ["probe_gpu_network"]

# Transport of the wheel -> the system's libraries that it needs.
_NEEDED = {
    "ibrc": ("libibverbs.so.1",),
    "ibgda": ("libmlx5.so.1", "libibverbs.so.1"),
    "ibdevx": ("libmlx5.so.1", "libibverbs.so.1"),
    "gpunetio": ("libmlx5.so.1", "libibverbs.so.1"),
    "libfabric": ("libfabric.so.1",),
    "ucx": ("libucp.so.0", "libucs.so.0"),
}
# Library -> packages of Debian and of Red Hat, and their relatives; of those that IBGDA or a transport below needs.
_PACKAGES = {
    "libibverbs.so.1": "libibverbs1 (Red Hat: libibverbs)",
    "libmlx5.so.1": "ibverbs-providers (Red Hat: libibverbs)",
    "libfabric.so.1": "libfabric1 (Red Hat: libfabric)",
}
_MLX5 = "mlx5_core"
# Driver of a NIC -> the transport for it. ibrc is what NVSHMEM takes by itself, and what IBGDA starts from.
_TRANSPORT_OF = {_MLX5: "ibrc", "efa": "libfabric"}
_PEER_MEMORY_MODULES = ("nvidia_peermem", "nv_peer_mem")
_MODULE_OPTIONS = """\
for a GPU that rings the NIC itself, in a file of /etc/modprobe.d, then reboot:
options nvidia NVreg_EnableStreamMemOPs=1 NVreg_RegistryDwords="PeerMappingOverride=1;\""""


def probe_gpu_network(root: Path = Path("/")) -> list[Finding]:
    """Transports of the NVSHMEM wheel, GPUDirect RDMA, and IBGDA; `root` is the file system's."""
    ports = rdma_ports(root)
    return [_judge_transports(ports), _judge_gpudirect(root, ports), _judge_ibgda(root, ports)]


def _judge_transports(ports: Sequence[Port]) -> Finding:
    check, names = "nvshmem transports", _transports()
    if not names:
        return Finding(check, "missing", "no NVSHMEM wheel, or none in it: look at the line nvshmem")
    absent = {name: [library for library in _NEEDED.get(name, ()) if not _loads(library)] for name in names}
    ready = [name for name in names if not absent[name]]
    parts = [f"{', '.join(ready) or 'none'} loadable"]
    parts += [f"{name} without {' and '.join(absent[name])}" for name in names if absent[name]]
    wanted = {_TRANSPORT_OF[port.driver] for port in ports if port.driver in _TRANSPORT_OF}
    parts += [f"no {name} in the wheel" for name in sorted(wanted - set(names))]
    if wanted <= set(ready) and ready:
        return Finding(check, "ok", "; ".join(parts))
    libraries = sorted({library for name in wanted for library in absent.get(name, ())})
    advice = f"install {', '.join(_PACKAGES[library] for library in libraries)}" if libraries else ""
    return Finding(check, "missing", "; ".join(parts), advice)


def _transports() -> list[str]:
    """Names of the transports in the wheel, by their order above, then unknown ones."""
    files = (re.match(r"nvshmem_transport_(\w+)\.so", path.name) for path in find_library("nvshmem_transport_*.so*"))
    names = {match[1] for match in files if match}
    return [name for name in _NEEDED if name in names] + sorted(names - _NEEDED.keys())


def _loads(library: str) -> bool:
    # The name is looked up by the loader, as the transport itself would be; this is the process of the probe alone.
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _judge_gpudirect(root: Path, ports: Sequence[Port]) -> Finding:
    """Whether NICs can reach GPU memory: by the peer-memory module, or by DMA-BUF."""
    check = "gpudirect rdma"
    dma_buf = _driver_has_dma_buf()
    if dma_buf is None:
        return Finding(check, "missing", "no usable GPU")
    loaded = [line.split()[0] for line in read_text(root / "proc/modules").splitlines() if line.strip()]
    ways = [module for module in _PEER_MEMORY_MODULES if module in loaded] + ["DMA-BUF"] * dma_buf
    if ways:
        return Finding(check, "ok", f"by {' or '.join(ways)}")
    text = "NICs cannot reach GPU memory: no nvidia_peermem, and the driver has no DMA-BUF"
    advice = "modprobe nvidia-peermem, or the open kernel modules of the driver" if ports else ""
    return Finding(check, "missing", f"{text} (only jobs on several hosts need it)", advice)


def _driver_has_dma_buf() -> bool | None:
    """Of the first GPU; None where there is none."""
    driver = load_driver()
    try:
        if driver is None or not driver.gpus():
            return None
        return driver.has_dma_buf(0)
    except DriverError:
        return None


def _judge_ibgda(root: Path, ports: Sequence[Port]) -> Finding:
    """Who would work the NIC: the GPU alone, the GPU with the CPU at the doorbell, or the CPU."""
    if not any(port.driver == _MLX5 for port in ports):
        return Finding("ibgda", "missing", "no NIC with the mlx5 driver (only jobs on several hosts need one)")
    parameters = read_text(root / "proc/driver/nvidia/params")
    if not parameters:
        return Finding("ibgda", "missing", "no NVIDIA driver")
    lacking = _lacking_options(parameters)
    parts = ["the GPU could ring the NIC itself"]
    if lacking:
        # Since NVSHMEM 3.4.5, by itself (NVSHMEM_IBGDA_NIC_HANDLER=auto); before, IBGDA did not start.
        parts = [f"the CPU would ring the NIC for the GPU, since {' and '.join(lacking)}"]
    advice = [_MODULE_OPTIONS] if lacking else []
    setting = env.lookup("NVSHMEM_IB_ENABLE_IBGDA")
    parts.append(f"NVSHMEM_IB_ENABLE_IBGDA={setting}" if setting else "NVSHMEM_IB_ENABLE_IBGDA is not set")
    if not setting:  # 0 is a choice
        advice.insert(0, "for jobs on several hosts: export NVSHMEM_IB_ENABLE_IBGDA=1")
    absent = [library for library in _NEEDED["ibgda"] if not _loads(library)]
    if absent:
        parts.insert(0, f"no {' and '.join(absent)}")
        advice.insert(0, f"install {', '.join(_PACKAGES[library] for library in absent)}")
    return Finding("ibgda", "missing" if absent else "ok", "; ".join(parts), "\n".join(advice))


def _lacking_options(parameters: str) -> list[str]:
    """Options of the driver's kernel module without which a GPU may not write to a NIC."""
    values = dict(line.split(": ", 1) for line in parameters.splitlines() if ": " in line)
    lacking = []
    if values.get("EnableStreamMemOPs", "").strip() != "1":
        lacking.append("EnableStreamMemOPs is not 1")
    if not re.search(r"\bPeerMappingOverride=(1|0x1)\b", values.get("RegistryDwords", "")):
        lacking.append("PeerMappingOverride is not 1")
    return lacking
