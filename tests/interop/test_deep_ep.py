"""A program written for DeepEP V1, run with its imports changed; and the names it may use."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
from helpers.torch_jobs import run_torch_ranks

from epcomm import Config, EventOverlap, run_local
from epcomm.errors import InputError

torch = pytest.importorskip("torch")
deep_ep = pytest.importorskip("epcomm.interop.deep_ep")

PROGRAM = str(Path(__file__).with_name("v1_program.py"))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_v1_program_over_a_process_group(tmp_path, num_ranks):
    codes, output = run_torch_ranks(num_ranks, [PROGRAM, "torch"], tmp_path)
    assert codes == [0] * num_ranks, output
    assert output.count("all checks passed") == num_ranks, output


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_v1_program_over_mpi(run_ranks, num_ranks):
    code, output = run_ranks(num_ranks, [sys.executable, "-m", "mpi4py", PROGRAM, "mpi"], timeout_s=90)
    assert code == 0, output
    assert output.count("all checks passed") == num_ranks, output


def test_constructor_has_v1s_order():
    names = list(inspect.signature(deep_ep.Buffer).parameters)
    assert names == [
        "group",
        "num_nvl_bytes",
        "num_rdma_bytes",
        "low_latency_mode",
        "num_qps_per_rank",
        "allow_nvlink_for_low_latency_mode",
        "allow_mnnvl",
        "explicitly_destroy",
        "enable_shrink",
        "comm",
    ]


def test_names_of_the_module():
    assert deep_ep.topk_idx_t is torch.int64
    assert deep_ep.Config is Config
    assert deep_ep.EventOverlap is deep_ep.utils.EventOverlap is EventOverlap
    event = deep_ep.utils.EventOverlap(deep_ep.utils.EventHandle())
    with event:
        pass
    event.current_stream_wait()


def test_static_calls_follow_set_num_sms():
    before = deep_ep.Buffer.num_sms
    try:
        deep_ep.Buffer.set_num_sms(12)
        assert deep_ep.Buffer.num_sms == 12
        assert deep_ep.Buffer.get_dispatch_config(8).num_sms == 12
        assert deep_ep.Buffer.get_combine_config(8).num_sms == 12
    finally:
        deep_ep.Buffer.set_num_sms(before)
    assert isinstance(deep_ep.Buffer.capture(), EventOverlap)


def test_group_may_be_any_communicator():
    def rank_main(comm):
        with deep_ep.Buffer(comm) as buffer:
            return buffer.group is comm, buffer.rank, buffer.group_size

    assert run_local(2, rank_main) == [(True, 0, 2), (True, 1, 2)]


@pytest.mark.parametrize(("group", "comm"), [(None, None), (object(), object())], ids=["neither", "both"])
def test_group_or_comm(group, comm):
    with pytest.raises(InputError, match=r"Buffer: got .*; wanted one of them; pass group="):
        deep_ep.Buffer(group, comm=comm)
