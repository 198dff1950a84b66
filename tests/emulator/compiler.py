"""CUDA text in, a shared object for this machine's CPU out: g++, where the package has NVRTC.

The text is preprocessed with ``device/`` in front of all other include folders, so that it gets that folder's twins of
``ptx/*.cuh`` and of CUDA's own headers. Then what no macro can express is rewritten (kernels and their parameters,
``__shared__`` variables), and the result compiled. For each kernel ENTRY the object exports

    ``void ENTRY(const void* parameters)``      the parameters as they lie in memory: for one struct, its address
    ``size_t ENTRY_parameter_bytes``            of all parameters
    ``uint32_t ENTRY_parameter_count``
    ``uint32_t ENTRY_parameter_offsets[]``      in that memory, and the end of the last parameter
    ``uint32_t ENTRY_max_threads``              of a block

and once

    ``int emulator_launch(void* entry, uint32_t blocks, uint32_t threads, uint64_t shared_bytes, void* parameters)``
                                                runs a grid on the calling thread; not 0: it failed, and stderr says why
    ``uint32_t emulator_static_shared_bytes()`` static shared memory of all kernels of the object together
    ``char emulator_architecture[]``            ``sm_90``, or what else the object was compiled for

With ``EPCOMM_EMULATOR_SEED`` in the environment, another number than 0, launches draw by lot which thread runs next.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["CompilationFailed", "compile_text", "has_compiler"]

DEVICE = Path(__file__).resolve().parent / "device"

_ARCHITECTURES = {75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121}
_ARCHITECTURE = re.compile(r"(?:-arch|--gpu-architecture)=(.*)")
_NAME = re.compile(r"(?:sm|compute)_(\d+)[af]?")

# Each floating-point operation is rounded once, memory is read as any type, and nothing is unwound.
_FLAGS = (
    *("-std=c++20", "-O2", "-w", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-fno-exceptions", "-fno-rtti"),
    *("-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-fno-threadsafe-statics"),
    "-fstack-clash-protection",  # a large frame does not step over the guard page
)


class CompilationFailed(Exception):
    """The text is no program for the emulator. The message is g++'s log, in the form of NVRTC's."""


def has_compiler() -> bool:
    """Whether there is a g++ to compile with."""
    return shutil.which("g++") is not None


def compile_text(text: str, name: str, options: Sequence[str]) -> bytes:
    """Compile a CUDA program. Objects are kept in a private folder, and found again by what they were made of.

    Args:
        text: the program.
        name: stands for the text in messages.
        options: those of NVRTC. ``-arch``, ``-D`` and ``-I`` count, what else there is has no meaning here.

    Raises:
        CompilationFailed: with the messages of g++.
    """
    architecture, defines, folders = _read(options)
    start = f'# 1 "{name}"\n'
    prelude, _, program = _preprocess(start + text + "\n", architecture, defines, folders).partition(start)
    program = _rewrite(program)
    program += f'extern "C" {_VISIBLE} const char emulator_architecture[];\n'
    program += f'const char emulator_architecture[] = "{architecture}";\n'
    return _compile(prelude + start + program)


def _read(options: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """Architecture, defines (``NAME=VALUE``) and include folders."""
    architecture, defines, folders = "sm_75", [], []
    values = iter(options)
    for option in values:
        if match := _ARCHITECTURE.fullmatch(option):
            architecture = match[1]
        elif match := re.fullmatch(r"(-D|-I|--define-macro=|--include-path=)(.*)", option):
            value = match[2] or next(values)
            (defines if match[1] in ("-D", "--define-macro=") else folders).append(value)
    match = _NAME.fullmatch(architecture)
    if not match or int(match[1]) not in _ARCHITECTURES:
        raise CompilationFailed("nvrtc: error: invalid value for --gpu-architecture (-arch)\n")
    return architecture.replace("compute", "sm"), defines, folders


def _preprocess(text: str, architecture: str, defines: list[str], folders: list[str]) -> str:
    number = int(re.sub(r"\D", "", architecture)) * 10
    command = [
        *("g++", "-E", *_FLAGS, "-x", "c++"),
        *(f"-D{define}" for define in [f"__CUDA_ARCH__={number}", *defines]),
        *(f"-I{os.path.abspath(folder)}" for folder in [DEVICE, *folders]),
        *("-include", "emulator/prelude.h", "-"),
    ]
    # The folder of the text, which g++ would search first, is the working folder: one with nothing in it.
    empty = _folder() / "empty"
    empty.mkdir(exist_ok=True)
    return _run(command, text, empty)


def _compile(source: str) -> bytes:
    digest = hashlib.sha256("\0".join([_version(), *_FLAGS, source]).encode()).hexdigest()
    path = _folder() / f"{digest}.so"
    with _lock(path):  # ranks start together, and want the same
        if not path.exists():
            new = path.with_suffix(".new")
            _run(["g++", "-shared", *_FLAGS, "-x", "c++", "-fpreprocessed", "-", "-o", str(new)], source, _folder())
            new.replace(path)
    return path.read_bytes()


# -- what is rewritten --------------------------------------------------------------------------------------------

_VISIBLE = '__attribute__((visibility("default")))'
_IN_PARENTHESES = r"\(((?:[^()]|\([^()]*\))*)\)"
_ALIGNED = rf"(?:(?:__align__|alignas)\s*{_IN_PARENTHESES}\s*)?"

_BOUNDS = rf"(?:__launch_bounds__\s*{_IN_PARENTHESES}\s*)?"
_KERNEL = re.compile(rf'extern\s+"C"\s+__global__\s+{_BOUNDS}void\s+{_BOUNDS}(\w+)\s*{_IN_PARENTHESES}\s*\{{')
_GRID_CONSTANT = re.compile(r"\bconst\s+__grid_constant__\s+([\w:<>, ]+?)\s*\b(\w+)\s*(?=,|$)")
_DYNAMIC = re.compile(rf"\bextern\s+__shared__\s+{_ALIGNED}([\w:<>, *]+?)\s*\b(\w+)\s*\[\s*\]\s*;")
_STATIC = re.compile(rf"(?:\bstatic\s+)?\b__shared__\s+{_ALIGNED}([\w:<>, *]+?)\s*\b(\w+)\s*((?:\[[^\]]*\]\s*)*);")
_ALIGN = re.compile(rf"\b__align__\s*{_IN_PARENTHESES}")
_GLOBALTIMER = re.compile(
    r'\basm\s+volatile\s*\(\s*"mov\.u64\s+%0,\s*%%?globaltimer;"\s*:\s*"=l"\s*\((\w+)\)[^()]*\)\s*;'
)


def _rewrite(text: str) -> str:
    """The preprocessed text with what g++ does not understand replaced, on the same lines."""
    text = _KERNEL.sub(_kernel, text)
    text = re.sub(rf"\b__global__\b|\b__launch_bounds__\s*{_IN_PARENTHESES}", "", text)
    text = _DYNAMIC.sub(r"\2 * const \3 = ::emulator::dynamic_shared<\2>();", text)
    text = _STATIC.sub(_static_variable, text)
    text = _ALIGN.sub(r"__attribute__((aligned(\1)))", text)
    return _GLOBALTIMER.sub(r"\1 = ::emulator_globaltimer();", text)


def _kernel(match: re.Match[str]) -> str:
    """A kernel under another name, and what is exported under its own."""
    bounds, name = match[1] or match[2] or "1024", match[3]
    parameters = _GRID_CONSTANT.sub(r"const \1& \2", match[4].strip())
    kernel, table = f"{name}_kernel", f"::emulator::Parameters<decltype({name}_kernel)>"
    exports = {
        f"unsigned long {name}_parameter_bytes": f"{table}::kNumBytes",
        f"unsigned int {name}_parameter_count": f"{table}::kCount",
        f"::emulator::Offsets<{table}::kCount + 1> {name}_parameter_offsets": f"{table}::kOffsets",
        f"unsigned int {name}_max_threads": f"::emulator::first_of({bounds})",
    }
    return " ".join(
        [
            f'extern "C" void {kernel}({parameters});',
            *(f'extern "C" {_VISIBLE} const {name}; const {name} = {value};' for name, value in exports.items()),
            f'extern "C" {_VISIBLE} void {name}(const void* arguments) {{ {table}::call({kernel}, arguments); }}',
            f'extern "C" void {kernel}({parameters}) {{',
        ]
    )


def _static_variable(match: re.Match[str]) -> str:
    """A reference to where the variable lies in the shared memory of the block that runs."""
    alignment, base, name, extents = match[1] or "1", *match.groups()[1:]
    type_name = f"{name}_in_shared_memory"
    variable = f"::emulator::shared_variable<{type_name}, {alignment}, [] {{}}>()"
    return f"typedef {base} {type_name}{extents}; auto& {name} = {variable};"


# -- g++ ----------------------------------------------------------------------------------------------------------

_MESSAGE = re.compile(r"^([^\s:][^:\n]*):(\d+)(?::\d+)?: (?=(?:fatal )?(?:error|warning|note)\b)", re.MULTILINE)


def _run(command: list[str], text: str, folder: Path) -> str:
    done = subprocess.run(command, input=text, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CompilationFailed(_MESSAGE.sub(r"\1(\2): ", done.stderr) or f"g++ ended with status {done.returncode}\n")
    return done.stdout


@functools.cache
def _version() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _folder() -> Path:
    """Of this user alone: what lies there is loaded as code."""
    folder = Path(tempfile.gettempdir()) / f"epcomm-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} does not belong to this user alone: remove it")
    return folder


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
