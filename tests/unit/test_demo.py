"""The demo: options, text, gate, the checks that must fail when something is wrong, the report. No MPI."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from epcomm import cli, env
from epcomm.bootstrap import SoloCommunicator, run_local
from epcomm.buffer import Buffer
from epcomm.cli import demo, job
from epcomm.cli.demo import program, report
from epcomm.cli.demo.arrays import CupyArrays
from epcomm.cli.demo.checks import compare_layers
from epcomm.cli.demo.model import BFLOAT16, Expert, LayerConfig, MoeLayer, fit_groups
from epcomm.cli.demo.program import Task, run_ranks_part
from epcomm.cli.demo.text import MAX_TOKENS, first_tokens, load_text
from epcomm.errors import InputError

TEXT = b"Every token goes to the ranks that own its experts, and comes back as their sum. " * 2


def make_task(num_experts: int = 8, text: bytes = TEXT) -> Task:
    return Task(LayerConfig(num_experts, 2, 64, seed=0), text, "a text", "host", None)


def run_demo(num_ranks: int, task: Task) -> program.Outcome:
    """The outcome of rank 0, with the ranks as threads."""
    return run_local(num_ranks, run_ranks_part, task)[0]


@pytest.fixture(autouse=True)
def outside_of_jobs(monkeypatch):
    for name in env.LAUNCHER_SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def short_text(tmp_path) -> str:
    """A file; the default text takes longer."""
    path = tmp_path / "short.txt"
    path.write_bytes(TEXT)
    return str(path)


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--experts", "6"], "--experts: got 6; wanted a multiple of the 4 ranks"),
        (["--experts", "0"], "--experts: got 0"),
        (["--experts", "8", "--topk", "9"], "--topk: got 9; wanted 1 to 8 for 8 experts"),
        (["--topk", "33"], "--topk: got 33; wanted 1 to 32"),
        (["--topk", "0"], "--topk: got 0"),
        (["--hidden", "20"], "--hidden: got 20; wanted a multiple of 8"),
        (["--hidden", "0"], "--hidden: got 0"),
        (["--ranks", "0"], "--ranks: got 0; wanted at least 1"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--text", "no-such-file"], "--text: got no-such-file (No such file or directory)"),
        (["--text", "/"], "--text: got / (Is a directory)"),
        (["--plot", "no-such-folder/x.png"], "--plot: got no-such-folder/x.png"),
        (["--plot", "/"], "--plot: got /"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_one_line_and_status_2(options, named, capsys, monkeypatch):
    monkeypatch.setattr(job, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    assert cli.main(["demo", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"epcomm demo: {named}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_backend_that_is_not_there_is_said_before_ranks_start(capsys, monkeypatch):
    monkeypatch.setattr(job, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    assert cli.main(["demo", "--backend", "cuda"]) == 1
    assert "backend='cuda'" in capsys.readouterr().err


def test_plot_without_matplotlib_has_the_pip_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda _name: None)
    assert cli.main(["demo", "--plot", str(tmp_path / "x.png")]) == 1
    assert "pip install 'epcomm[plot]'" in capsys.readouterr().err


def test_the_ranks_get_the_options_of_their_starter(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(job, "run_ranks", lambda n, command, env: (started.append((n, command)), (-9, ""))[1])
    options = ["--experts=6", "--topk=2", "--hidden=64", "--seed=3", "--backend=host"]
    if importlib.util.find_spec("matplotlib"):  # else the option is refused
        options.append(f"--plot={tmp_path}/a b.png")
    assert cli.main(["demo", "--ranks=3", *options]) == 128 + 9
    [(num_ranks, command)] = started
    assert num_ranks == 3
    given = command[command.index("demo") :]
    assert set(given) == {"demo", "--started", "--ranks=3", *options}


def test_a_rank_that_was_started_starts_no_others(monkeypatch, capsys):
    monkeypatch.setattr(job, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    monkeypatch.setattr(job, "as_communicator", lambda _comm: SoloCommunicator())
    assert cli.main(["demo", "--started", "--ranks=4"]) == 2
    assert capsys.readouterr().err == "epcomm demo: --ranks: got 4; wanted 1, the ranks of this job, or nothing\n"


def test_the_number_of_ranks_is_that_of_the_job(monkeypatch):
    tasks = []
    monkeypatch.setattr(job, "as_communicator", lambda _comm: SoloCommunicator())
    monkeypatch.setenv("PMI_SIZE", "1")
    args = argparse.Namespace(started=False, ranks=None)
    status = job.run("x", args, lambda _args, num_ranks: num_ranks, lambda _comm, task: tasks.append(task) or 7)
    assert (status, tasks) == (7, [1])


# -- text ---------------------------------------------------------------------------------------------------------


def test_the_packages_own_text_is_there():
    text, name = load_text(None)
    assert 100 < len(text) <= MAX_TOKENS
    assert "epcomm" in name


@pytest.mark.parametrize("content", [b"", b"\x7fELF\0\0", b"caf\xe9 au lait"], ids=["empty", "binary", "latin1"])
def test_no_text_is_an_error(content, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError, match="--text: got"):
        load_text(str(path))


def test_text_may_be_cut_inside_a_character(tmp_path):
    path = tmp_path / "umlauts.txt"
    path.write_text("x" + "ä" * MAX_TOKENS, encoding="utf-8")
    text, name = load_text(str(path))
    assert (len(text), name) == (MAX_TOKENS, "umlauts.txt")


@pytest.mark.parametrize(("num_tokens", "num_ranks"), [(4096, 4), (10, 3), (2, 5)])
def test_tokens_are_shared_out_evenly(num_tokens, num_ranks):
    first = first_tokens(num_tokens, num_ranks)
    sizes = np.diff(first)
    assert (first[0], first[-1], len(sizes)) == (0, num_tokens, num_ranks)
    assert sizes.max() - sizes.min() <= 1


# -- layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "num_topk", "groups"),
    [
        (256, 8, (8, 4)),
        (64, 8, (8, 4)),
        (6, 2, (3, 2)),
        (8, 8, (4, 4)),
        (16, 13, (8, 7)),
        (7, 2, (1, 1)),
        (1, 1, (1, 1)),
    ],
)
def test_groups_fit_the_experts(num_experts, num_topk, groups):
    assert fit_groups(num_experts, num_topk) == groups


def test_rows_are_functions_of_the_global_token():
    layer = MoeLayer(LayerConfig(8, 2, 64, seed=1), b"aab" * 10)
    rows = layer.embed(range(30))
    np.testing.assert_array_equal(layer.embed(np.array([7, 3])), rows[[7, 3]])
    assert len(np.unique(rows.view(np.uint16), axis=0)) == 30


def test_gate_by_hand():
    config = LayerConfig(num_experts=12, num_topk=3, hidden=16, seed=5)  # 6 groups of 2, 3 kept
    layer = MoeLayer(config, TEXT)
    x = layer.embed(range(40))
    topk_idx, weights = layer.gate(x)
    affinity = 1 / (1 + np.exp(-(x.astype(np.float64) @ layer._centroids)))
    for token, scores in enumerate(affinity.tolist()):
        by_group = sorted(range(6), key=lambda group, s=scores: -(s[2 * group] + s[2 * group + 1]))
        allowed = [expert for group in by_group[:3] for expert in (2 * group, 2 * group + 1)]
        chosen = sorted(allowed, key=lambda expert, s=scores: -s[expert])[:3]
        assert topk_idx[token].tolist() == chosen
        total = sum(scores[expert] for expert in chosen)
        np.testing.assert_allclose(weights[token], [2.5 * scores[expert] / total for expert in chosen], rtol=1e-6)


def test_group_limit_changes_the_choice():
    layer = MoeLayer(LayerConfig(num_experts=12, num_topk=3, hidden=16, seed=5), TEXT)
    x = layer.embed(range(40))
    free = np.argsort(-(x.astype(np.float64) @ layer._centroids), axis=1)[:, :3]
    assert (np.sort(free) != np.sort(layer.gate(x)[0])).any()


# -- checks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_ranks", "task"),
    [(1, make_task()), (2, make_task()), (3, make_task(num_experts=9, text=b"ab")), (4, make_task(num_experts=4))],
    ids=["one_rank", "two_ranks", "a_rank_without_tokens", "one_expert_per_rank"],
)
def test_the_checks_hold(num_ranks, task):
    outcome = run_demo(num_ranks, task)
    assert outcome.holds, (outcome.dispatch_problems, outcome.combine_problems, outcome.error)
    assert outcome.rows.shape == (num_ranks, num_ranks)
    assert outcome.expert_load.sum() == len(task.text) * 2
    assert all(time_s > 0 for time_s in outcome.times_s.values())


def test_the_checks_hold_on_two_nodes(monkeypatch):
    monkeypatch.setenv("EPCOMM_RANKS_PER_NODE", "2")
    outcome = run_demo(4, make_task())
    assert outcome.holds, (outcome.dispatch_problems, outcome.combine_problems, outcome.error)
    assert outcome.topology.num_nodes == 2


def break_dispatch(monkeypatch, change):
    """Let `change` loose on what rank 1 receives."""
    dispatch = Buffer.dispatch

    def broken(buffer, *args, **kwargs):
        result = dispatch(buffer, *args, **kwargs)
        if buffer.rank == 1:
            change(result)
        return result

    monkeypatch.setattr(Buffer, "dispatch", broken)


def flip_a_bit(result):
    result.recv_x.view(np.uint16)[3, 5] ^= 1


def swap_rows(result):
    result.recv_x[[0, 1]] = result.recv_x[[1, 0]]


def change_a_choice(result):
    row, choice = np.argwhere(result.recv_topk_idx >= 0)[0]
    result.recv_topk_idx[row, choice] = (result.recv_topk_idx[row, choice] + 1) % 4


def change_a_weight(result):
    row, choice = np.argwhere(result.recv_topk_idx >= 0)[0]
    result.recv_topk_weights[row, choice] *= 1 + 2.0**-20


@pytest.mark.parametrize(
    ("change", "named"),
    [(flip_a_bit, "rows"), (swap_rows, "rows"), (change_a_choice, "expert indices"), (change_a_weight, "weights")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_dispatch_is_found(change, named, monkeypatch):
    break_dispatch(monkeypatch, change)
    outcome = run_demo(2, make_task())
    assert not outcome.holds
    assert outcome.dispatch_problems[0] == ""
    assert outcome.dispatch_problems[1].startswith(f"{named}: ")
    assert f"rank 1: {named}: " in report.report(outcome)


def test_wrong_combine_is_found(monkeypatch):
    combine = Buffer.combine

    def broken(buffer, *args, **kwargs):
        result = combine(buffer, *args, **kwargs)
        if buffer.rank == 1:
            result.combined_x.view(np.uint16)[2, 0] ^= 1
        return result

    monkeypatch.setattr(Buffer, "combine", broken)
    outcome = run_demo(2, make_task())
    assert not outcome.holds
    assert outcome.combine_problems[0] == ""
    assert outcome.combine_problems[1].startswith("rows: 1 of ")


def test_an_expert_left_out_is_found(monkeypatch):
    forget = program.forward

    def broken(buffer, arrays, layer, experts, x, timer):
        return forget(buffer, arrays, layer, experts[:-1] if buffer.rank == 1 else experts, x, timer)

    monkeypatch.setattr(program, "forward", broken)
    outcome = run_demo(2, make_task())
    assert not outcome.error.holds
    assert not any(outcome.dispatch_problems + outcome.combine_problems)
    assert "FAIL  layer" in report.report(outcome)


def test_arrays_of_a_gpu_take_the_same_way(monkeypatch):
    # NumPy stands for CuPy, and the host backend for CUDA.
    cupy = SimpleNamespace(
        **{name: getattr(np, name) for name in ("asarray", "empty", "float32", "isnan", "nonzero", "where", "zeros")},
        asnumpy=np.asarray,
        ElementwiseKernel=lambda *_: lambda a, b, _depth, _width, product: np.matmul(a, b, out=product),
        cuda=SimpleNamespace(
            Device=lambda: SimpleNamespace(id=0),
            get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None),
            runtime=SimpleNamespace(getDeviceProperties=lambda _: {"name": b"a GPU"}),
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(program, "arrays_of", lambda _: CupyArrays())
    outcome = run_demo(2, make_task())
    assert outcome.holds
    assert "(CuPy on a GPU); 2 ranks on 1 node" in report.report(outcome)


def test_layers_are_compared_element_by_element():
    want = np.ones((2, 4), BFLOAT16)
    magnitude = np.ones((2, 4), np.float32)
    got = want.copy()
    got[1, 2] = 1 + 2.0**-5  # the tolerance is 8 * 2^-8
    error = compare_layers(got, want, magnitude)
    assert (error.largest, error.tolerance, error.equal_share) == (2.0**-5, pytest.approx(2.0**-5), 7 / 8)
    assert error.holds
    got[1, 2] = 1 + 2.0**-5 + 2.0**-7
    assert not compare_layers(got, want, magnitude).holds
    got[1, 2] = np.nan
    assert not compare_layers(got, want, magnitude).holds


# -- report -------------------------------------------------------------------------------------------------------


def test_heat_map():
    counts = np.array([[0, 1, 50, 51], [100, 101, 399, 400]])
    assert report.heat_map(counts, ".1234") == [".111", "1244"]
    assert report.heat_map(np.array([[0, 8], [1, 7]])) == ["·█", "▁▇"]
    assert report.heat_map(np.zeros((1, 3), np.int64)) == ["···"]


def test_imbalance():
    assert report.imbalance(np.array([[1, 1], [1, 5]])) == 2.5
    assert report.imbalance(np.zeros(4, np.int64)) == 1.0


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("num_experts", [8, 128], ids=["few_experts", "more_than_a_line"])
def test_report_fits_a_terminal(encoding, num_experts):
    task = make_task(num_experts)
    outcome = run_demo(2, task)
    text = report.report(outcome, encoding)
    text.encode(encoding)
    assert max(map(len, text.splitlines())) <= 80
    shades = report.BLOCKS if encoding == "utf-8" else report.ASCII_SHADES
    assert f"by rank (a row); {shades[-1]} = {outcome.expert_load.max()}" in text
    logical = outcome.rows.sum() * (64 * 2 + 2 * 12) / 1e6
    assert f"  dispatch {logical:9.3f}" in text
    assert "host (NumPy on the CPU" in text


def test_one_rank_needs_no_mpi(short_text):
    code = (
        "import sys; sys.modules['mpi4py'] = None; from epcomm.cli import main; "
        "sys.exit(main(['demo', '--ranks=1', '--hidden=64', '--experts=8', '--text=' + sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, short_text], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\nall checks hold\n")


def test_a_failed_check_is_status_1(monkeypatch, capsys, short_text):
    monkeypatch.setattr(Expert, "__call__", lambda expert, rows, *_: rows * np.float32(np.nan))
    assert cli.main(["demo", "--ranks=1", "--hidden=64", "--experts=8", f"--text={short_text}"]) == 1
    assert capsys.readouterr().out.endswith("\nTHE CHECK FAILED\n")


def test_plot_writes_a_png(tmp_path, capsys, short_text):
    pytest.importorskip("matplotlib")
    path = tmp_path / "demo.png"
    options = ["--hidden=64", "--experts=8", f"--text={short_text}", f"--plot={path}"]
    assert cli.main(["demo", "--ranks=1", *options]) == 0
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 10_000
    assert f"wrote {path}" in capsys.readouterr().out
