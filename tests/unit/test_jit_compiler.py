"""Programs, compiler messages and the options that the bitwise contract hangs on."""

from __future__ import annotations

import pickle
import sys

import pytest
from helpers.nvrtc import needs_nvrtc

from epcomm.errors import CompileError, MissingDependency
from epcomm.jit import compiler
from epcomm.jit.compiler import Program, compile_program, compile_text, compiler_options
from epcomm.jit.source import source_digest

KERNEL = 'extern "C" __global__ void probe(float* x) { *x = VALUE; }\n'


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder of CUDA sources to edit: a kernel and a header that it includes."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "value.cuh").write_text("#define VALUE 1\n")
    (tmp_path / "kernels" / "probe.cu").write_text(f'#include "common/value.cuh"\n{KERNEL}')
    monkeypatch.setenv("EPCOMM_CUDA_SRC", str(tmp_path))
    return tmp_path


def test_programs_that_mean_the_same_are_equal():
    first = Program("a.cu", (("B", "2"), ("A", "1")))
    second = Program("a.cu", (("A", "1"), ("B", "2")))
    assert first == second
    assert hash(first) == hash(second)
    assert str(first) == "a.cu -DA=1 -DB=2"
    assert first != Program("a.cu", (("A", "1"),))


def test_the_digest_follows_every_file(sources):
    seen = {source_digest(): "original"}
    for name in ("common/value.cuh", "kernels/probe.cu"):
        path = sources / name
        path.write_text(path.read_text() + "// edited\n")
        assert seen.setdefault(source_digest(), name) == name
    path = (sources / "common" / "value.cuh").rename(sources / "common" / "other.cuh")
    assert source_digest() not in seen
    path.rename(sources / "common" / "value.cuh")
    assert seen[source_digest()] == "kernels/probe.cu"


def test_the_first_errors_of_a_log_are_shown():
    errors = [f"a.cu({n}): error: identifier e{n} is undefined\n  text\n  ^\n" for n in range(5)]
    log = "a.cu(1): warning #177-D: unused\n  int i;\n\n" + "\n".join(errors) + "\n5 errors detected"
    shown = compiler._errors_of(log)
    assert "warning" not in shown
    assert [f"e{n} " in shown for n in range(5)] == [True, True, True, False, False]
    assert shown.endswith("(2 more)")
    assert compiler._errors_of("nothing known\nof this form") == "nothing known\nof this form"
    ptxas = "ptxas application ptx input, line 2; error   : Unknown\nptxas fatal   : aborted"
    assert compiler._errors_of(ptxas) == ptxas.splitlines()[0]


def test_a_compile_error_survives_the_way_to_another_rank():
    error = CompileError("a.cu", got="x", do="y", options=["-a"], log="long")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.options, copy.log) == ("a.cu: got x; y", ["-a"], "long")


def test_a_source_that_is_not_there(sources):
    with pytest.raises(CompileError, match=r"^kernels/none\.cu: got No such file .*; wanted the file .*none\.cu$"):
        compile_program(Program("kernels/none.cu"), "90")


def test_without_cuda_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependency, match=r"^cuda-bindings: .*pip install 'epcomm\[cuda13\]'"):
        compile_text("", "a.cu", "90")


@needs_nvrtc
def test_options_of_the_bitwise_contract():
    options = compiler_options("90", (("N", "8"),))
    assert {"-arch=sm_90", "-ftz=false", "-DN=8"} <= set(options)
    assert not [option for option in options if "fast" in option or "fmad" in option]


@needs_nvrtc
def test_an_error_has_the_file_the_options_and_the_log(sources):
    (sources / "kernels" / "probe.cu").write_text("\n__global__ void probe() { nope(); }\n")
    with pytest.raises(CompileError) as caught:
        compile_program(Program("kernels/probe.cu", (("N", "8"),)), "90")
    assert "kernels/probe.cu(2): error: identifier" in str(caught.value)
    assert "-arch=sm_90" in str(caught.value)
    assert "-DN=8" in caught.value.options
    assert "1 error detected" in caught.value.log


@needs_nvrtc
def test_defines_and_architecture_reach_the_compiler(sources):
    text = '#if N == 8\nextern "C" __global__ void probe() {}\n#else\n#error wrong N\n#endif\n'
    (sources / "kernels" / "probe.cu").write_text(text)
    cubins = [compile_program(Program("kernels/probe.cu", (("N", "8"),)), a) for a in ("80", "90", "90a")]
    assert all(cubin.startswith(b"\x7fELF") and b"probe" in cubin for cubin in cubins)
    assert len(set(cubins)) == 3
    with pytest.raises(CompileError, match="wrong N"):
        compile_program(Program("kernels/probe.cu", (("N", "9"),)), "90")
    with pytest.raises(CompileError, match="invalid value for --gpu-architecture"):
        compile_program(Program("kernels/probe.cu", (("N", "8"),)), "12345")


@needs_nvrtc
def test_the_working_folder_is_not_searched(sources, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for folder in ("", "kernels", "kernels/common", "common"):
        (elsewhere / folder).mkdir(exist_ok=True)
    for folder in ("kernels/common", "common"):
        (elsewhere / folder / "value.cuh").write_text("#error the wrong header\n")
    monkeypatch.chdir(elsewhere)
    compile_program(Program("kernels/probe.cu"), "90")
