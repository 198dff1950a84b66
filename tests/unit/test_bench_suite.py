"""``epcomm bench --report``: its steps, its summary, and that no step takes more than its time."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

import epcomm
from epcomm.cli.bench import suite
from epcomm.cli.bench.suite import Step
from epcomm.errors import InputError

WRITES = (
    "import sys; open(sys.argv[-1].partition('=')[2], 'w').write('{\"operation\": \"dispatch\"}\\n'); print('rows')"
)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def titles(num_ranks: int, tests: Path | None = None) -> list[str]:
    return [step.title for step in suite.steps(num_ranks, 132, 30, tests)]


def test_steps():
    tables = [
        *(f"low latency, {tokens}" for tokens in ("1 token", "16 tokens", "128 tokens", "512 tokens")),
        *(f"throughput, {tokens} tokens, {dtype}" for tokens in (4096, 8192) for dtype in ("bf16", "fp8")),
    ]
    assert titles(8) == tables
    assert titles(8, Path("tests")) == ["tests of 2 to 8 ranks", *tables]
    assert titles(1, Path("tests")) == tables


def test_commands():
    tests, *tables = suite.steps(3, 132, 30, Path("tests"))
    assert tests.command[tests.command.index("-k") + 1] == "np2 or np3"
    assert str(Path("tests") / "test_throughput.py") in tests.command
    for step in tables:
        assert {"--ranks=3", "--backend=cuda", "--experts=258", "--hidden=7168", "--topk=8"} < set(step.command)
    assert sum("--sms=8,16,24,32" in step.command for step in tables) == 4
    assert sum("--sms=24,64" in step.command for step in tables) == 4
    # No more than there is room for.
    few = [option for step in suite.steps(3, 20, 30, None) for option in step.command if "sms" in option]
    assert few == 4 * ["--sms=20"] + 4 * ["--sms=8,16,20"]


def test_where_the_tests_are(monkeypatch, tmp_path):
    root = Path(__file__).parents[2]
    monkeypatch.setattr(epcomm, "__path__", [str(tmp_path / "epcomm")])
    monkeypatch.chdir(tmp_path)
    assert suite._tests_folder() is None
    monkeypatch.chdir(root)
    assert suite._tests_folder() == root / "tests" / "cuda"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(epcomm, "__path__", [str(root / "epcomm")])
    assert suite._tests_folder() == root / "tests" / "cuda"


def test_a_step(capsys):
    found, problem = suite._run(Step("rows of one", python(WRITES), True, 20), 20)
    assert (found, problem) == ([{"operation": "dispatch", "step": "rows of one"}], "")
    assert capsys.readouterr().out == "== rows of one\nrows\n\n"


def test_tests_show_their_last_lines(capsys):
    found, problem = suite._run(Step("tests", python("print(*range(9), sep='\\n')"), False, 20), 20)
    assert (found, problem) == ([], "")
    assert capsys.readouterr().out == "== tests\n6\n7\n8\n"


def test_a_step_that_fails():
    found, problem = suite._run(Step("rows", python("raise SystemExit(3)"), True, 20), 20)
    assert (found, problem) == ([], "rows: failed with status 3")


def test_a_step_whose_time_is_up(capsys):
    start = time.monotonic()
    code = "import time; print('begun', flush=True); time.sleep(60)"
    assert suite._run(Step("slow", python(code), True, 1), 1) == ([], "slow: ended after 1 s")
    assert time.monotonic() - start < 30
    assert "begun" in capsys.readouterr().out
    assert suite._run(Step("late", python(code), True, 1), 0) == ([], "late: not run, the time was up")


def record(step: str, **values: object) -> dict[str, object]:
    machine = {"ranks": 8, "num_gpus": 8, "gpu": "NVIDIA H200", "peer_bytes_per_s": 3.9e11}
    return {"step": step, "sms": 24, "p50_us": 800.0, "p99_us": 810.0, **machine, **values}


def test_summary():
    alone = {"rows_written_bytes_per_s": 3.33e11, "rows_read_bytes_per_s": 2.96e11}
    records = [
        record(
            "throughput", operation="dispatch, cached, outside", chain_us=740.0, wire_bytes_per_rank=270.1e6, **alone
        ),
        record("throughput", operation="get_dispatch_layout", chain_us=10.0, wire_bytes_per_rank=0),
        record("throughput", operation="dispatch", chain_us=99.0, wire_bytes_per_rank=1e6, **{**alone, "sms": 32}),
        record("low latency", operation="dispatch, fp8", graph_us=20.0, row_us=22.0, wire_bytes_per_rank=4.4e6),
    ]
    lines = list(suite.summary(records, ["tests: failed with status 1"]))
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "report: 8 ranks on 8 x NVIDIA H200" in text
    assert "390 GB/s (the ceiling)" in text
    assert [line.split()[-3:] for line in lines if "outside" in line] == [["740.0", "365.0", "98.6"]]
    assert [line.split()[-3:] for line in lines if "fp8" in line] == [["20.0", "220.0", "59.5"]]
    # What SMs can do at most, once for each number of them; not for the low-latency mode, which does not measure it.
    assert [line.split() for line in lines if "rows alone" in line] == [
        ["rows", "alone,", "written", "24", "333.0", "90.0"],
        ["rows", "alone,", "read", "24", "296.0", "80.0"],
        ["rows", "alone,", "written", "32", "333.0", "90.0"],
        ["rows", "alone,", "read", "32", "296.0", "80.0"],
    ]
    assert lines[-1] == "  tests: failed with status 1"
    assert list(suite.summary([], [])) == []


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(backend="auto", ranks=None, repeats=3, json=str(tmp_path / "lines"))


def test_main(options, monkeypatch, capsys):
    monkeypatch.setattr(suite, "_check", lambda args: (2, 132))
    values = record("", operation="dispatch", chain_us=100.0, wire_bytes_per_rank=1e6)
    code = f"import sys; open(sys.argv[-1].partition('=')[2], 'w').write({json.dumps(values)!r} + '\\n')"
    plan = [Step("good", python(code), True, 20), Step("bad", python("raise SystemExit(1)"), True, 20)]
    monkeypatch.setattr(suite, "steps", lambda *_: iter(plan))
    assert suite.main(options) == 1
    assert "bad: failed with status 1" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in Path(options.json).read_text().splitlines()] == ["good"]
    del plan[1]
    monkeypatch.setattr(suite, "_tests_folder", lambda: None)
    assert suite.main(options) == 0
    assert "tests: not run" in capsys.readouterr().out


def test_without_a_gpu(options, monkeypatch, capsys):
    monkeypatch.setattr(suite.job, "backend_here", lambda wanted: "host")
    with pytest.raises(InputError, match=r"^--report: got the host backend; wanted a machine with GPUs"):
        suite._check(options)
    assert suite.main(options) == 2
    assert "--report" in capsys.readouterr().err
