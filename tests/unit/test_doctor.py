"""`epcomm doctor`: every probe answers here, a broken probe is a line of the report, and the rules of the exit status.

What each probe makes of machines unlike this one is in test_doctor_probes.py; the two-rank smoke test itself
is in tests/host/test_doctor.py.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from epcomm import env
from epcomm.cli import doctor
from epcomm.cli.doctor import child, findings, runner
from epcomm.cli.doctor.findings import Finding
from epcomm.cli.doctor.runner import Probe

FAKE_PROBES = '''
import atexit, os, signal, subprocess, sys
from epcomm.cli.doctor import child
from epcomm.cli.doctor.findings import Finding

def fine():
    return [Finding("fake", "ok", "all well")]

def hang():
    """Starts a process of its own, which holds the FIFO open for as long as it lives, and never answers."""
    fifo = os.open(os.environ["FAKE_FIFO"], os.O_WRONLY)
    subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], pass_fds=[fifo])
    os.write(fifo, b"started")
    signal.pause()

def hang_deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pause()

def abort():
    os.abort()

def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def leave():
    sys.exit(0)

def fail():
    raise OSError("libfake.so.7: cannot open shared object file")

def noisy():
    sys.stderr.write("warning\\n" * 100_000)
    sys.stdout.write("half a line")
    return fine()

def no_list():
    return 42

def nothing():
    return []

def not_json():
    print(child.ANSWER + "{[")
    os._exit(0)

def foreign_record():
    print(child.ANSWER + '[{"check": "fake", "status": "splendid", "text": "", "advice": ""}]', flush=True)
    os._exit(0)

def crash_at_exit():
    atexit.register(os.abort)
    return fine()
'''


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes probes of the functions above: `fake("hang")`."""
    (tmp_path / "fake_probes.py").write_text(FAKE_PROBES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(function, **options):
        return Probe("fake", f"fake_probes:{function}", **options)

    return make


@pytest.fixture
def fifo(tmp_path, monkeypatch):
    """Read end of a FIFO whose end-of-file says that every process of the `hang` probe is gone."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    monkeypatch.setenv("FAKE_FIFO", str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield descriptor
    os.close(descriptor)


def read_until_gone(descriptor):
    data = b""
    while select.select([descriptor], [], [], 10.0)[0]:
        chunk = os.read(descriptor, 4096)
        if not chunk:
            return data
        data += chunk
    pytest.fail("a process of the probe is still alive")


def parse(*arguments):
    parser = argparse.ArgumentParser()
    doctor.add_parser(parser.add_subparsers())
    return parser.parse_args(["doctor", *arguments])


# The real probes


@pytest.fixture(scope="module")
def report():
    probes = [probe for probe in runner.PROBES if not probe.last]
    return probes, runner.run_all(probes)


@pytest.mark.slow
def test_every_probe_answers_on_this_machine(report):
    _, found = report
    broken = [finding for finding in found if "answer" in finding.text]
    assert broken == []


@pytest.mark.slow
def test_every_check_of_the_task_has_a_line(report):
    _, found = report
    checks = [finding.check for finding in found]
    assert len(checks) == len(set(checks))
    wanted = {
        "python",
        "epcomm",
        "cuda sources",
        "cuda backend",
        "numpy",
        "ml_dtypes",
        "mpi4py",
        "mpirun",
        "driver",
        "gpu",
    }
    wanted |= {"mps", "cupy", "nvrtc", "nvjitlink", "kernels", "nvshmem", "torch", "jax", "shared memory", "cache"}
    wanted |= {"nodes", "nics", "ethernet", "nvshmem transports", "gpudirect rdma", "ibgda"}
    assert wanted | set(env.VARIABLES) <= set(checks)


@pytest.mark.slow
def test_findings_are_well_formed(report):
    _, found = report
    for finding in found:
        assert finding == Finding.from_record(vars(finding))
        assert finding.text
        assert "\n" not in finding.text


def test_the_parent_imports_nothing_heavy():
    code = (
        "import sys; from epcomm.cli import doctor; from epcomm.cli.doctor import runner;"
        "print(sorted({'torch', 'jax', 'cupy', 'mpi4py.MPI', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_torch_and_jax_are_in_different_processes():
    targets = {probe.name: probe.target for probe in runner.PROBES}
    assert targets["torch"] != targets["jax"]
    limits = {probe.name: probe.timeout_s for probe in runner.PROBES}
    assert limits["torch"] == limits["jax"] == 60


def test_only_the_smoke_tests_run_last():
    assert [probe.name for probe in runner.PROBES if probe.last] == ["smoke test", "gpu smoke test"]
    assert runner.PROBES[-1].last


# Probes that break

BROKEN = {
    "abort": ("abort", "killed by SIGABRT without an answer: Fatal Python error: Aborted"),
    "segfault": ("segfault", "killed by SIGSEGV without an answer: Fatal Python error: Segmentation fault"),
    "killed": ("killed", "killed by SIGKILL without an answer: it printed nothing"),
    "leaves_silently": ("leave", "ended with status 0 without an answer: it printed nothing"),
    "raises": ("fail", "without an answer: OSError: libfake.so.7: cannot open shared object file"),
    "returns_no_list": ("no_list", "without an answer: TypeError"),
    "returns_nothing": ("nothing", "an answer that makes no sense: not a list of findings"),
    "prints_rubbish": ("not_json", "an answer that makes no sense"),
    "unknown_status": ("foreign_record", "an answer that makes no sense: not a finding"),
    "no_such_function": ("unheard_of", "without an answer: AttributeError"),
}


@pytest.mark.parametrize(("function", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_probe_is_one_failed_line(fake, function, words):
    (finding,) = runner.run_probe(fake(function, advice="pip install fake"))
    assert (finding.check, finding.status, finding.advice) == ("fake", "FAIL", "pip install fake")
    assert words in finding.text


@pytest.mark.slow
def test_a_hanging_probe_is_killed_with_its_children(fake, fifo):
    (finding,) = runner.run_probe(fake("hang", timeout_s=1.2))
    assert (finding.status, finding.text) == ("FAIL", "no answer after 1.2 s; killed")
    assert "--timeout" in finding.advice
    assert read_until_gone(fifo) == b"started"


@pytest.mark.slow
def test_a_probe_that_ignores_the_first_signal_is_killed(fake, monkeypatch):
    monkeypatch.setattr(runner, "_GRACE_S", 0.1)
    (finding,) = runner.run_probe(fake("hang_deaf"), timeout_s=0.5)
    assert finding.text == "no answer after 0.5 s; killed"


def test_noise_around_an_answer_is_ignored(fake):
    assert runner.run_probe(fake("noisy")) == [Finding("fake", "ok", "all well")]


def test_a_crash_after_the_answer_keeps_the_answer(fake):
    answer, crash = runner.run_probe(fake("crash_at_exit"))
    assert answer == Finding("fake", "ok", "all well")
    assert crash.status == "warn"
    assert "killed by SIGABRT after its answer" in crash.text


def test_a_probe_that_cannot_be_started(fake, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    (finding,) = runner.run_probe(fake("fine"))
    assert finding.status == "FAIL"
    assert "could not be started" in finding.text


def test_one_broken_probe_does_not_take_the_others(fake):
    found = runner.run_all([fake("abort"), fake("fine"), fake("fail"), fake("noisy", last=True)])
    assert [finding.status for finding in found] == ["FAIL", "ok", "FAIL", "ok"]


def test_a_module_in_the_current_folder_does_not_shadow(fake, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(elsewhere)
    assert runner.run_probe(fake("fine")) == [Finding("fake", "ok", "all well")]


def test_an_interrupt_ends_the_probes(fake, fifo):
    code = (
        "import argparse, sys; from epcomm.cli import doctor; from epcomm.cli.doctor import runner;"
        "runner.PROBES = (runner.Probe('fake', 'fake_probes:hang'),);"
        "sys.exit(doctor.main(argparse.Namespace(json=False, job=False, timeout=60.0)))"
    )
    root = str(Path(doctor.__file__).parents[3])
    changes = {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], root])}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env={**os.environ, **changes}, stdout=subprocess.PIPE, text=True) as process:
        assert select.select([fifo], [], [], 10.0)[0], "the probe never started"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=10.0)
    assert (process.returncode, output) == (130, "")
    assert read_until_gone(fifo) == b"started"


# The report and the exit status

HEALTHY = [
    Finding("cuda backend", "ok", "there"),
    Finding("cuda sources", "ok", "9 files"),
    Finding("gpu", "warn", "1 x GPU"),
    Finding("cupy", "ok", "14"),
    Finding("nvrtc", "ok", "13.0"),
    Finding("kernels", "ok", "7 compiled"),
    Finding("smoke test", "ok", "bitwise right"),
]


def without(check, status="FAIL"):
    return [Finding(f.check, status, "broken", "mend it") if f.check == check else f for f in HEALTHY]


@pytest.mark.parametrize("status", ["warn", "missing", "FAIL"])
def test_host_works_only_with_a_good_smoke_test(status):
    assert findings.host_works(HEALTHY)
    assert not findings.host_works(without("smoke test", status))
    assert not findings.host_works([])


def test_cuda_state_names_the_first_thing_missing():
    assert findings.cuda_state(HEALTHY) == "has all it needs (not exercised)"
    for check in ("cuda backend", "cuda sources", "gpu", "cupy", "nvrtc", "kernels"):
        assert findings.cuda_state(without(check)) == f"not usable ({check}: broken)"
    assert findings.cuda_state([]) == "not usable (cuda backend: not checked)"


def test_cuda_works_only_with_a_good_smoke_test():
    smoke = Finding("gpu smoke test", "ok", "bitwise right")
    assert findings.cuda_state([*HEALTHY, smoke]) == "works"
    smoke = Finding("gpu smoke test", "FAIL", "wrong")
    assert findings.cuda_state([*HEALTHY, smoke]) == "has all it needs, but does not work (wrong)"
    assert findings.cuda_state([*without("gpu"), smoke]) == "not usable (gpu: broken)"


def test_text_is_aligned_with_advice_below():
    lines = findings.to_text(without("gpu")).splitlines()
    assert lines[1] == "ok       cuda sources  9 files"
    assert lines[2:4] == ["FAIL     gpu           broken", "                       -> mend it"]
    assert lines[-1] == "host backend: works; cuda backend: not usable (gpu: broken)"


def test_colour_changes_no_column():
    plain, coloured = findings.to_text(HEALTHY), findings.to_text(HEALTHY, colour=True)
    assert "\033[" not in plain
    for code in (*findings._COLOURS.values(), findings._PLAIN):
        coloured = coloured.replace(code, "")
    assert coloured == plain


@pytest.mark.parametrize(("tty", "no_color", "wanted"), [(True, None, True), (True, "1", False), (False, None, False)])
def test_colour_only_at_a_terminal(monkeypatch, tty, no_color, wanted):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    assert findings.wants_colour() is wanted


NOT_FINDINGS = {
    "text": "ok",
    "no_advice": {"check": "a", "status": "ok", "text": "b"},
    "number": {"check": "a", "status": "ok", "text": 3, "advice": ""},
    "status": {"check": "a", "status": "fine", "text": "b", "advice": ""},
}


@pytest.mark.parametrize("record", NOT_FINDINGS.values(), ids=NOT_FINDINGS.keys())
def test_records_that_are_no_findings(record):
    with pytest.raises(ValueError, match="not a finding"):
        Finding.from_record(record)


def run_main(monkeypatch, capsys, found, *arguments):
    monkeypatch.setattr(runner, "run_all", lambda probes, *, timeout_s: found)
    args = parse(*arguments)
    return args.func(args), capsys.readouterr().out


def test_json_parses_and_says_the_same_as_the_text(monkeypatch, capsys):
    status, output = run_main(monkeypatch, capsys, without("gpu"), "--json")
    printed = json.loads(output)
    assert status == 0
    assert [Finding.from_record(record) for record in printed["findings"]] == without("gpu")
    assert (printed["host"], printed["cuda"]) == (True, "not usable (gpu: broken)")


def test_exit_status_is_that_of_the_host_backend(monkeypatch, capsys):
    assert run_main(monkeypatch, capsys, without("gpu"))[0] == 0
    status, output = run_main(monkeypatch, capsys, without("smoke test"))
    assert status == 1
    assert "host backend: does not work" in output


@pytest.mark.slow
def test_timeout_reaches_every_probe(fake, fifo, monkeypatch, capsys):
    monkeypatch.setattr(runner, "PROBES", (fake("hang"),))
    args = parse("--timeout", "0.5")
    assert args.func(args) == 1
    assert "no answer after 0.5 s" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_is_a_positive_number(text, capsys):
    with pytest.raises(SystemExit):
        parse("--timeout", text)
    assert "--timeout" in capsys.readouterr().err


def test_the_child_runs_this_tree():
    command = child.command("some.module", "argument", runner=("-m", "mpi4py"))
    root = str(Path(doctor.__file__).parents[3])
    assert command[:5] == [sys.executable, "-P", "-m", "mpi4py", "-c"]
    assert command[6:] == [root, "argument"]
