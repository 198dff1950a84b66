"""Probes of what ranks on several hosts talk through: NICs and network interfaces, as the kernel shows them in /sys.

One host needs none of it, so what is not there is missing and no failure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from epcomm import env
from epcomm.cli.doctor.findings import Finding
from epcomm.errors import InputError

__all__ = ["Port", "probe_network", "rdma_ports", "read_text"]

_ETHERNET = "1"  # ARPHRD_ETHER of if_arp.h; loopback and InfiniBand have other numbers
_MAX_NAMES = 4
_JOB = "`epcomm doctor --job` under the launcher of a job shows its nodes"


@dataclass(frozen=True)
class Port:
    """A port of an RDMA device.

    Attributes:
        device: its name, such as mlx5_0.
        number: of the port, from 1.
        driver: kernel module of the device, such as mlx5_core; empty where /sys does not say.
        link_layer: InfiniBand or Ethernet (RoCE), or what another driver says.
        is_active: it can carry data.
        gbit_s: Gbit/s each way, 0 where /sys does not say.
    """

    device: str
    number: int
    driver: str
    link_layer: str
    is_active: bool
    gbit_s: float


def rdma_ports(root: Path = Path("/")) -> list[Port]:
    """All ports of this host's RDMA devices, by device and number; `root` is the file system's."""
    ports = []
    for device in sorted((root / "sys/class/infiniband").glob("*"), key=_by_numbers):
        driver = device / "device/driver"
        name = driver.resolve().name if driver.exists() else ""
        for port in sorted((device / "ports").glob("[0-9]*"), key=_by_numbers):
            # "4: ACTIVE" and "400 Gb/sec (4X NDR)", see the kernel's Documentation/ABI/stable/sysfs-class-infiniband
            state, rate = read_text(port / "state"), re.match(r"[\d.]+", read_text(port / "rate"))
            ports.append(
                Port(
                    device=device.name,
                    number=int(port.name),
                    driver=name,
                    link_layer=read_text(port / "link_layer") or "unknown link",
                    is_active=state.partition(": ")[2] == "ACTIVE",
                    gbit_s=float(rate[0]) if rate else 0.0,
                )
            )
    return ports


def probe_network(root: Path = Path("/")) -> list[Finding]:
    """What the launcher says of nodes, the RDMA devices, and the Ethernet interfaces; `root` is the file system's."""
    return [_judge_nodes(), _judge_ports(rdma_ports(root)), _judge_interfaces(root)]


def _judge_nodes() -> Finding:
    """By the environment alone: a probe is a process of its own and cannot be a rank of the job around it."""
    size, local_rank = env.launcher_size(), env.launcher_local_rank()
    text = "no launcher around this process" if size == 1 else f"{size} ranks by the launcher"
    if size > 1 and local_rank is not None:
        text += f", this one is number {local_rank} of its host"
    try:
        per_node = env.get("EPCOMM_RANKS_PER_NODE")
    except InputError:  # has its own line, in the environment
        per_node = 0
    if per_node:
        text += f"; EPCOMM_RANKS_PER_NODE={per_node} makes virtual nodes"
        if per_node < 0 or (size > 1 and size % per_node):
            advice = "unset EPCOMM_RANKS_PER_NODE, or set it to a divisor of the number of ranks"
            return Finding("nodes", "warn", text, advice)
    return Finding("nodes", "ok", f"{text}; {_JOB}")


def _judge_ports(ports: Sequence[Port]) -> Finding:
    if not ports:
        return Finding("nics", "missing", "no InfiniBand, RoCE or EFA device (only jobs on several hosts need one)")
    active = [port for port in ports if port.is_active]
    kinds = Counter((port.link_layer, port.driver, port.gbit_s) for port in active)
    parts = []
    for (layer, driver, gbit_s), count in kinds.items():
        alike = [port for port in active if (port.link_layer, port.driver, port.gbit_s) == (layer, driver, gbit_s)]
        rate = f"{gbit_s:g} Gbit/s each (--nic-gbs {gbit_s / 8:g} of epcomm plan)" if gbit_s else "rate unknown"
        parts.append(f"{count} x {layer}{f' ({driver})' if driver else ''}, {rate}: {_names(alike)}")
    idle = [port for port in ports if not port.is_active]
    if not active:
        advice = "look at cable, switch and subnet manager: ibstat; of RoCE: ip link"
        return Finding("nics", "missing", f"none of {len(ports)} ports is active: {_names(idle)}", advice)
    if idle:
        parts.append(f"not active: {_names(idle)}")
    return Finding("nics", "ok", "; ".join(parts))


def _names(ports: Sequence[Port]) -> str:
    """The first few, as ``device:number``."""
    names = [f"{port.device}:{port.number}" for port in ports[:_MAX_NAMES]]
    return ", ".join([*names, "..."] if len(ports) > _MAX_NAMES else names)


def _judge_interfaces(root: Path) -> Finding:
    """Interfaces of real devices; where there is none, as in a container, those that are up."""
    folders = sorted((root / "sys/class/net").glob("*"), key=_by_numbers)
    ethernet = [folder for folder in folders if read_text(folder / "type") == _ETHERNET]
    real = [folder for folder in ethernet if (folder / "device").exists()]
    shown = real or [folder for folder in ethernet if read_text(folder / "operstate") == "up"]
    if not shown:
        return Finding("ethernet", "missing", "no interface (only jobs on several hosts need one)")
    return Finding("ethernet", "ok", ", ".join(map(_interface, shown)))


def _interface(folder: Path) -> str:
    state, speed = read_text(folder / "operstate"), read_text(folder / "speed")
    if state != "up":
        return f"{folder.name} {state or 'unknown'}"
    # Mbit/s; -1, or an error of the read, from drivers that do not know.
    return f"{folder.name} {int(speed) / 1000:g} Gbit/s" if speed.isdigit() else f"{folder.name} up, rate unknown"


def read_text(path: Path) -> str:
    """Contents of a file of /sys or /proc, stripped; empty where it cannot be read, as `speed` of what is down."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _by_numbers(path: Path) -> list[tuple[int, str]]:
    """Sorts mlx5_10 behind mlx5_9."""
    return [(int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]
