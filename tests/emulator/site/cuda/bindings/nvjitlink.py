"""Stand-in for ``cuda.bindings.nvjitlink``: programs of the emulator need no linking."""

from __future__ import annotations

import enum


class nvJitLinkError(Exception):
    pass


class InputType(enum.IntEnum):
    CUBIN = 1
    LIBRARY = 6


class _Linker:
    image = b""


def version() -> tuple[int, int]:
    return 13, 0


def create(num_options: int, options: list[str]) -> _Linker:
    return _Linker()


def add_data(linker: _Linker, kind: InputType, data: bytes, num_bytes: int, name: str) -> None:
    assert kind == InputType.CUBIN
    linker.image = data[:num_bytes]


def add_file(linker: _Linker, kind: InputType, path: str) -> None:
    assert kind == InputType.LIBRARY


def complete(linker: _Linker) -> None:
    pass


def get_linked_cubin_size(linker: _Linker) -> int:
    return len(linker.image)


def get_linked_cubin(linker: _Linker, target: bytearray) -> None:
    target[:] = linker.image


def destroy(linker: _Linker) -> None:
    pass
