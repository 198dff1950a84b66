"""The network's probes of `epcomm doctor` on other hosts: a file system, a driver and libraries made up.

What ranks of a job say together (``--job``) is in tests/host/test_doctor.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from epcomm import env
from epcomm.cli.doctor import gpu, gpu_network, network
from epcomm.cli.doctor.findings import Finding


class Host:
    """A file system with as much of /sys and /proc as the probes read."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def add_port(
        self, device, port=1, *, state="4: ACTIVE", rate="400 Gb/sec (4X NDR)", link="InfiniBand", driver=None
    ):
        folder = f"sys/class/infiniband/{device}"
        for name, text in {"state": state, "rate": rate, "link_layer": link}.items():
            self.write(f"{folder}/ports/{port}/{name}", text)
        if driver is not None:
            (self.root / "sys/bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
            (self.root / folder / "device").mkdir(exist_ok=True)
            link_to = self.root / folder / "device/driver"
            if not link_to.exists():
                link_to.symlink_to(self.root / "sys/bus/pci/drivers" / driver)

    def add_interface(self, name, *, kind=1, state="up", speed="100000", is_real=True):
        folder = f"sys/class/net/{name}"
        for file, text in {"type": str(kind), "operstate": state, "speed": speed}.items():
            self.write(f"{folder}/{file}", text)
        if is_real:
            (self.root / folder / "device").mkdir()

    def set_driver_options(self, stream_mem_ops=0, registry=""):
        lines = [
            "ResmanDebugLevel: 4294967295",
            f"EnableStreamMemOPs: {stream_mem_ops}",
            f'RegistryDwords: "{registry}"',
        ]
        self.write("proc/driver/nvidia/params", "\n".join(lines))

    def network(self) -> dict[str, Finding]:
        return {finding.check: finding for finding in network.probe_network(self.root)}

    def gpu_network(self) -> dict[str, Finding]:
        return {finding.check: finding for finding in gpu_network.probe_gpu_network(self.root)}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Without a GPU, a launcher, a wheel or libraries; tests add what they want."""
    for name in ("EPCOMM_RANKS_PER_NODE", "NVSHMEM_IB_ENABLE_IBGDA", *env.LAUNCHER_SIZE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name in ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu_network, "load_driver", lambda: None)
    monkeypatch.setattr(gpu_network, "find_library", lambda pattern: [])
    monkeypatch.setattr(gpu_network, "_loads", lambda library: False)
    return Host(tmp_path)


# Nodes


def test_no_launcher(host):
    finding = host.network()["nodes"]
    assert finding.status == "ok"
    assert finding.text.startswith("no launcher around this process; `epcomm doctor --job`")


@pytest.mark.parametrize(
    ("size", "local_rank"), [("PMI_SIZE", "MPI_LOCALRANKID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")]
)
def test_what_the_launcher_says(host, monkeypatch, size, local_rank):
    monkeypatch.setenv(size, "16")
    monkeypatch.setenv(local_rank, "3")
    assert host.network()["nodes"].text.startswith(
        "16 ranks by the launcher, this one is number 3 of its host; `epcomm"
    )


@pytest.mark.parametrize(("per_node", "status"), [("4", "ok"), ("5", "warn"), ("-1", "warn")])
def test_virtual_nodes_divide_the_ranks(host, monkeypatch, per_node, status):
    monkeypatch.setenv("PMI_SIZE", "16")
    monkeypatch.setenv("EPCOMM_RANKS_PER_NODE", per_node)
    finding = host.network()["nodes"]
    assert (finding.status, f"EPCOMM_RANKS_PER_NODE={per_node} makes virtual nodes" in finding.text) == (status, True)
    assert ("divisor" in finding.advice) == (status == "warn")


def test_virtual_nodes_of_any_size_without_ranks(host, monkeypatch):
    monkeypatch.setenv("EPCOMM_RANKS_PER_NODE", "5")
    assert host.network()["nodes"].status == "ok"


def test_a_number_that_is_none_is_told_elsewhere(host, monkeypatch):
    monkeypatch.setenv("EPCOMM_RANKS_PER_NODE", "many")
    assert host.network()["nodes"].status == "ok"


# NICs


def test_a_host_without_anything(host):
    assert {check: finding.status for check, finding in host.network().items()} == {
        "nodes": "ok",
        "nics": "missing",
        "ethernet": "missing",
    }


def test_equal_ports_are_one_entry_in_the_order_of_their_numbers(host):
    for number in reversed(range(12)):
        host.add_port(f"mlx5_{number}", driver="mlx5_core")
    assert host.network()["nics"] == Finding(
        "nics",
        "ok",
        "12 x InfiniBand (mlx5_core), 400 Gbit/s each (--nic-gbs 50 of epcomm plan): "
        "mlx5_0:1, mlx5_1:1, mlx5_2:1, mlx5_3:1, ...",
    )
    assert [port.device for port in network.rdma_ports(host.root)][9:] == ["mlx5_9", "mlx5_10", "mlx5_11"]


def test_ports_that_differ_and_ports_that_are_idle(host):
    host.add_port("mlx5_0", driver="mlx5_core")
    host.add_port("mlx5_0", 2, state="1: DOWN", rate="10 Gb/sec (4X SDR)", driver="mlx5_core")
    host.add_port("mlx5_1", link="Ethernet", rate="25 Gb/sec (1X EDR)", driver="mlx5_core")
    host.add_port("efa_0", link="Unspecified", rate="", driver="efa")
    parts = host.network()["nics"].text.split("; ")
    assert parts == [
        "1 x Unspecified (efa), rate unknown: efa_0:1",
        "1 x InfiniBand (mlx5_core), 400 Gbit/s each (--nic-gbs 50 of epcomm plan): mlx5_0:1",
        "1 x Ethernet (mlx5_core), 25 Gbit/s each (--nic-gbs 3.125 of epcomm plan): mlx5_1:1",
        "not active: mlx5_0:2",
    ]


@pytest.mark.parametrize("state", ["1: DOWN", "2: INIT", "3: ARMED", "5: ACTIVE_DEFER", ""])
def test_no_port_is_active(host, state):
    host.add_port("mlx5_0", state=state)
    finding = host.network()["nics"]
    assert (finding.status, finding.text) == ("missing", "none of 1 ports is active: mlx5_0:1")
    assert "ibstat" in finding.advice


def test_idle_ports_are_named_only_up_to_a_few(host):
    for number in range(5):
        host.add_port(f"mlx5_{number}", state="1: DOWN")
    shown = "mlx5_0:1, mlx5_1:1, mlx5_2:1, mlx5_3:1, ..."
    assert host.network()["nics"].text == f"none of 5 ports is active: {shown}"
    host.add_port("mlx5_5", rate="")
    assert host.network()["nics"].text == f"1 x InfiniBand, rate unknown: mlx5_5:1; not active: {shown}"


def test_a_file_that_is_not_there_is_no_failure(host):
    host.add_port("odd_0")
    for name in ("rate", "link_layer"):
        (host.root / "sys/class/infiniband/odd_0/ports/1" / name).unlink()
    assert host.network()["nics"].text == "1 x unknown link, rate unknown: odd_0:1"


# Interfaces


def test_interfaces_of_devices(host):
    host.add_interface("eth0")
    host.add_interface("eth1", state="down", speed="-1")
    host.add_interface("eth2", speed="-1")
    host.add_interface("lo", kind=772, is_real=False)
    host.add_interface("ib0", kind=32)
    host.add_interface("docker0", is_real=False)
    assert host.network()["ethernet"].text == "eth0 100 Gbit/s, eth1 down, eth2 up, rate unknown"


def test_a_container_has_interfaces_without_a_device(host):
    host.add_interface("eth0", speed="10000", is_real=False)
    host.add_interface("ifb0", state="down", is_real=False)
    assert host.network()["ethernet"] == Finding("ethernet", "ok", "eth0 10 Gbit/s")


# Transports

VERBS = ["libibverbs.so.1", "libmlx5.so.1"]


def set_transports(monkeypatch, *names, libraries=()):
    files = [Path(f"nvidia/nvshmem/lib/nvshmem_transport_{name}.so.3") for name in names]
    monkeypatch.setattr(gpu_network, "find_library", lambda pattern: files)
    monkeypatch.setattr(gpu_network, "_loads", lambda library: library in libraries)


@pytest.mark.parametrize(
    ("driver", "libraries", "status", "text", "advice"),
    [
        pytest.param(
            "mlx5_core",
            VERBS,
            "ok",
            "ibrc, ibgda loadable; libfabric without libfabric.so.1; ucx without libucp.so.0 and libucs.so.0",
            "",
            id="verbs",
        ),
        pytest.param(
            "mlx5_core",
            ["libfabric.so.1"],
            "missing",
            "libfabric loadable; ibrc without libibverbs.so.1; ibgda without libmlx5.so.1 and libibverbs.so.1; "
            "ucx without libucp.so.0 and libucs.so.0",
            "install libibverbs1 (Red Hat: libibverbs)",
            id="another_one_than_the_nic_wants",
        ),
        pytest.param(
            "efa",
            VERBS,
            "missing",
            "ibrc, ibgda loadable; libfabric without libfabric.so.1; ucx without libucp.so.0 and libucs.so.0",
            "install libfabric1 (Red Hat: libfabric)",
            id="efa",
        ),
        pytest.param(
            None,
            ["libfabric.so.1"],
            "ok",
            "libfabric loadable; ibrc without libibverbs.so.1; ibgda without libmlx5.so.1 and libibverbs.so.1; "
            "ucx without libucp.so.0 and libucs.so.0",
            "",
            id="no_nic",
        ),
    ],
)
def test_transports(host, monkeypatch, driver, libraries, status, text, advice):
    if driver:
        host.add_port("nic_0", driver=driver)
    set_transports(monkeypatch, "ucx", "ibrc", "libfabric", "ibgda", libraries=libraries)
    assert host.gpu_network()["nvshmem transports"] == Finding("nvshmem transports", status, text, advice)


def test_a_wheel_without_the_transport_of_the_nic(host, monkeypatch):
    host.add_port("efa_0", driver="efa")
    set_transports(monkeypatch, "ibrc", libraries=VERBS)
    finding = host.gpu_network()["nvshmem transports"]
    assert finding == Finding("nvshmem transports", "missing", "ibrc loadable; no libfabric in the wheel")


def test_no_wheel_has_no_transports(host):
    finding = host.gpu_network()["nvshmem transports"]
    assert (finding.status, finding.text) == ("missing", "no NVSHMEM wheel, or none in it: look at the line nvshmem")


def test_a_transport_that_nobody_knows_is_told(host, monkeypatch):
    set_transports(monkeypatch, "quantum")
    assert host.gpu_network()["nvshmem transports"].text == "quantum loadable"


def test_libraries_are_asked_of_the_loader():
    assert gpu_network._loads("libc.so.6")
    assert not gpu_network._loads("libnothing-of-the-kind.so.1")


# GPUDirect RDMA


def set_gpu(monkeypatch, *, dma_buf):
    class Cuda:
        """The calls that the probe makes, for one GPU."""

        def __getattr__(self, name):
            return lambda *arguments: 0

        def cuDeviceGetCount(self, count):
            count._obj.value = 1
            return 0

        def cuDeviceGetAttribute(self, value, attribute, device):
            value._obj.value = dma_buf if attribute == 124 else 9
            return 0

    monkeypatch.setattr(gpu_network, "load_driver", lambda: gpu.Driver(Cuda()))


@pytest.mark.parametrize(
    ("modules", "dma_buf", "text"),
    [
        pytest.param("nvidia 1 2\nnvidia_peermem 16384 0", False, "by nvidia_peermem", id="module"),
        pytest.param("nv_peer_mem 16384 0", False, "by nv_peer_mem", id="older_module"),
        pytest.param("nvidia 1 2", True, "by DMA-BUF", id="dma_buf"),
        pytest.param("nvidia_peermem 16384 0", True, "by nvidia_peermem or DMA-BUF", id="both"),
    ],
)
def test_ways_to_gpu_memory(host, monkeypatch, modules, dma_buf, text):
    host.write("proc/modules", modules)
    set_gpu(monkeypatch, dma_buf=dma_buf)
    assert host.gpu_network()["gpudirect rdma"] == Finding("gpudirect rdma", "ok", text)


@pytest.mark.parametrize("has_nic", [False, True])
def test_no_way_to_gpu_memory(host, monkeypatch, has_nic):
    host.write("proc/modules", "nvidia 1 nvidia_peermem\nnvidia_peermem_of_another_name 2")
    set_gpu(monkeypatch, dma_buf=False)
    if has_nic:
        host.add_port("mlx5_0", driver="mlx5_core")
    finding = host.gpu_network()["gpudirect rdma"]
    assert finding.status == "missing"
    assert ("modprobe nvidia-peermem" in finding.advice) == has_nic


def test_no_gpu_has_no_memory_to_reach(host):
    assert host.gpu_network()["gpudirect rdma"] == Finding("gpudirect rdma", "missing", "no usable GPU")


# IBGDA

OPTIONS = 'options nvidia NVreg_EnableStreamMemOPs=1 NVreg_RegistryDwords="PeerMappingOverride=1;"'


@pytest.fixture
def ibgda_host(host, monkeypatch):
    """With all that it takes."""
    host.add_port("mlx5_0", driver="mlx5_core")
    host.set_driver_options(1, "PeerMappingOverride=1;")
    monkeypatch.setattr(gpu_network, "_loads", lambda library: library in VERBS)
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "1")
    return host


def test_a_host_with_all_that_ibgda_takes(ibgda_host):
    text = "the GPU could ring the NIC itself; NVSHMEM_IB_ENABLE_IBGDA=1"
    assert ibgda_host.gpu_network()["ibgda"] == Finding("ibgda", "ok", text)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((0, "PeerMappingOverride=1;"), "EnableStreamMemOPs is not 1"),
        ((1, ""), "PeerMappingOverride is not 1"),
        ((1, "PeerMappingOverride=0;"), "PeerMappingOverride is not 1"),
        ((1, "PeerMappingOverride=16;"), "PeerMappingOverride is not 1"),
        ((0, "RMOther=1;"), "EnableStreamMemOPs is not 1 and PeerMappingOverride is not 1"),
    ],
)
def test_options_of_the_driver(ibgda_host, options, reason):
    ibgda_host.set_driver_options(*options)
    finding = ibgda_host.gpu_network()["ibgda"]
    assert finding.status == "ok"
    assert finding.text.startswith(f"the CPU would ring the NIC for the GPU, since {reason}; ")
    assert finding.advice.splitlines()[-1] == OPTIONS


def test_a_switch_that_is_off_is_a_choice(ibgda_host, monkeypatch):
    monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", "0")
    finding = ibgda_host.gpu_network()["ibgda"]
    assert (finding.text.partition("; ")[2], finding.advice) == ("NVSHMEM_IB_ENABLE_IBGDA=0", "")


@pytest.mark.parametrize("registry", ["PeerMappingOverride=1", "RMOther=0x7;PeerMappingOverride=0x1;"])
def test_ways_to_write_the_registry(ibgda_host, registry):
    ibgda_host.set_driver_options(1, registry)
    assert ibgda_host.gpu_network()["ibgda"].advice == ""


def test_ibgda_has_to_be_switched_on(ibgda_host, monkeypatch):
    monkeypatch.delenv("NVSHMEM_IB_ENABLE_IBGDA")
    finding = ibgda_host.gpu_network()["ibgda"]
    assert (finding.status, finding.advice) == ("ok", "for jobs on several hosts: export NVSHMEM_IB_ENABLE_IBGDA=1")


def test_ibgda_without_its_libraries(ibgda_host, monkeypatch):
    monkeypatch.setattr(gpu_network, "_loads", lambda library: False)
    finding = ibgda_host.gpu_network()["ibgda"]
    assert (finding.status, finding.text.partition(";")[0]) == ("missing", "no libmlx5.so.1 and libibverbs.so.1")
    assert finding.advice.startswith("install ibverbs-providers (Red Hat: libibverbs), libibverbs1")


def test_ibgda_is_for_mlx5_and_nvidia(host):
    assert "mlx5" in host.gpu_network()["ibgda"].text
    host.add_port("efa_0", driver="efa")
    assert "mlx5" in host.gpu_network()["ibgda"].text
    host.add_port("mlx5_0", driver="mlx5_core")
    assert host.gpu_network()["ibgda"] == Finding("ibgda", "missing", "no NVIDIA driver")
