"""The tokens of the demo: the bytes of a text, shared out to the ranks."""

from __future__ import annotations

import codecs
from importlib import metadata, resources
from pathlib import Path

from epcomm.errors import InputError

__all__ = ["MAX_TOKENS", "first_tokens", "load_text"]

MAX_TOKENS = 4096


def load_text(path: str | None) -> tuple[bytes, str]:
    """The first `MAX_TOKENS` bytes of a text, and its name.

    Args:
        path: a file of UTF-8 text; None: the long description of this package.

    Raises:
        InputError: the file cannot be read, is empty, or is no text.
    """
    if path is None:
        return _own_text()
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_TOKENS)
    except OSError as error:
        raise InputError("--text", got=f"{path} ({error.strerror})", wanted="a text file") from None
    if not text:
        raise InputError("--text", got=f"{path}, which is empty", wanted="a file with text in it")
    if not _is_text(text):
        raise InputError("--text", got=f"{path}, which is no UTF-8 text", wanted="a text file")
    return text, Path(path).name


def first_tokens(num_tokens: int, num_ranks: int) -> list[int]:
    """Global index of the first token of every rank, and `num_tokens` at the end; sizes differ by one at most."""
    return [num_tokens * rank // num_ranks for rank in range(num_ranks + 1)]


def _is_text(text: bytes) -> bool:
    try:
        # The cut may go through a character: an incomplete one at the end is none of the file's faults.
        codecs.getincrementaldecoder("utf-8")().decode(text)
    except UnicodeDecodeError:
        return False
    return b"\0" not in text


def _own_text() -> tuple[bytes, str]:
    """The README, from the installed package or its source tree; without one (an old pip) a source file."""
    try:
        description = metadata.metadata("epcomm").json.get("description")
    except metadata.PackageNotFoundError:
        description = None
    if description:
        return str(description).encode()[:MAX_TOKENS], "the README of epcomm"
    package = resources.files("epcomm")
    readme = Path(str(package)).parent / "README.md"
    if readme.is_file():
        return readme.read_bytes()[:MAX_TOKENS], "the README of epcomm"
    return package.joinpath("reference", "throughput.py").read_bytes()[:MAX_TOKENS], "the oracle of epcomm"
