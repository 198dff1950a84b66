"""What is built is what runs: wheel and sdist, made offline, hold the package, the CUDA sources and the licence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

from epcomm.jit.source import source_files

CHECKOUT = Path(__file__).resolve().parents[2]
VERSION = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["version"]
ASK = """
import json
from epcomm.jit.source import cuda_src_dir, source_files
print(json.dumps([str(cuda_src_dir()), [path.as_posix() for path in source_files()]]))
"""


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path

    @property
    def wheel_names(self) -> set[str]:
        return set(zipfile.ZipFile(self.wheel).namelist())

    @property
    def sdist_names(self) -> set[str]:
        """Paths of the files, without the leading folder."""
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Standard output of a program that must succeed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("EPCOMM_", "PYTHONPATH"))}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path, *targets: str, out: Path) -> None:
    options = [option for target in targets for option in ("-t", target)]
    run(sys.executable, "-m", "hatchling", "build", "-d", out, *options, cwd=folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    build(CHECKOUT, "sdist", "wheel", out=out)
    return Built(next(out.glob("*.whl")), next(out.glob("*.tar.gz")))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A folder with the wheel in it, as pip makes it."""
    pytest.importorskip("pip")
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--target"]
    run(sys.executable, "-m", "pip", "install", *options, target, built.wheel, cwd=target)
    return target


def modules_of_the_checkout() -> set[str]:
    files = (path for path in (CHECKOUT / "epcomm").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(CHECKOUT).as_posix() for path in files}


@pytest.mark.slow
def test_wheel(built):
    sources = {f"epcomm/cuda_src/{path.as_posix()}" for path in source_files()}
    assert len(sources) > 0
    info = f"epcomm-{VERSION}.dist-info"
    inside = {name for name in built.wheel_names if not name.startswith(info)}
    others = inside - modules_of_the_checkout() - sources
    assert modules_of_the_checkout() | sources <= inside
    assert all(name.startswith("epcomm/cuda_src/") for name in others), others
    assert "epcomm/py.typed" in inside
    assert f"{info}/licenses/LICENSE" in built.wheel_names
    assert built.wheel.name == f"epcomm-{VERSION}-py3-none-any.whl"


@pytest.mark.slow
def test_metadata(built):
    info = f"epcomm-{VERSION}.dist-info"
    with zipfile.ZipFile(built.wheel) as wheel:
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "MIT"
    assert licence == (CHECKOUT / "LICENSE").read_text()
    assert metadata.get_payload() == (CHECKOUT / "README.md").read_text()
    required = {line.partition(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert required == {"numpy", "ml-dtypes", "mpi4py"}
    assert "epcomm = epcomm.__main__:main" in scripts


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(built, tmp_path):
    assert {f"cuda_src/{path.as_posix()}" for path in source_files()} <= built.sdist_names
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/conftest.py"} <= built.sdist_names
    with tarfile.open(built.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    build(tmp_path / f"epcomm-{VERSION}", "wheel", out=tmp_path)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as again, zipfile.ZipFile(built.wheel) as first:
        assert {f.filename: f.CRC for f in again.infolist()} == {f.filename: f.CRC for f in first.infolist()}


@pytest.mark.slow
def test_an_installed_wheel_finds_its_sources(installed, tmp_path):
    folder, files = json.loads(run(sys.executable, "-P", "-c", ASK, cwd=tmp_path, path=installed))
    assert Path(folder) == installed / "epcomm" / "cuda_src"
    assert files == [path.as_posix() for path in source_files()]


def test_a_checkout_finds_its_own_sources(tmp_path):
    """From any folder; that is what an editable install sees."""
    folder, files = json.loads(run(sys.executable, "-P", "-c", ASK, cwd=tmp_path, path=CHECKOUT))
    assert Path(folder) == CHECKOUT / "cuda_src"
    assert files == [path.as_posix() for path in source_files()]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["program", "module"])
def test_an_installed_program_knows_its_version(installed, tmp_path, how):
    command = [installed / "bin" / "epcomm"] if how == "program" else [sys.executable, "-P", "-m", "epcomm"]
    assert run(*command, "--version", cwd=tmp_path, path=installed) == f"epcomm {VERSION}\n"


def test_a_checkout_knows_its_version(tmp_path):
    assert run(sys.executable, "-P", "-m", "epcomm", "--version", cwd=tmp_path, path=CHECKOUT) == f"epcomm {VERSION}\n"
