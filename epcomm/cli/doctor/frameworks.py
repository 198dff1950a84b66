"""Probes of PyTorch and JAX; each imports its framework, so they never share a process."""

from __future__ import annotations

import importlib

from epcomm.cli.doctor.findings import Finding
from epcomm.cli.doctor.packages import installed

__all__ = ["probe_jax", "probe_torch"]

_OPTIONAL = "not installed (optional: epcomm takes its arrays where it is)"


def probe_torch() -> list[Finding]:
    """Version and build of PyTorch, by importing it."""
    if not installed("torch"):
        return [Finding("torch", "missing", _OPTIONAL, "pip install torch")]
    torch = importlib.import_module("torch")
    if torch.version.cuda is None:
        return [Finding("torch", "ok", f"{torch.__version__}, CPU build")]
    usable = "GPU usable" if torch.cuda.is_available() else "no usable GPU"
    return [Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda} build, {usable}")]


def probe_jax() -> list[Finding]:
    """Versions of JAX and jaxlib and its CUDA plugin, by importing it; no backend is started.

    Starting JAX's GPU backend would take most of the GPU's memory from whatever runs there.
    """
    versions = installed("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin")
    if "jax" not in versions:
        return [Finding("jax", "missing", _OPTIONAL, "pip install jax")]
    jax = importlib.import_module("jax")
    plugins = [f"{name} {version}" for name, version in versions.items() if name.endswith("-plugin")]
    build = ", ".join(plugins) or "CPU build"
    return [Finding("jax", "ok", f"{jax.__version__}, jaxlib {versions.get('jaxlib', 'missing')}, {build}")]
