"""Symbols of a cubin, which is an ELF file of 64 bits, least significant byte first."""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ["Symbol", "symbols"]

_SYMBOL_TABLE = 2  # sh_type
_BINDINGS = {0: "local", 1: "global", 2: "weak"}
_KINDS = {0: "none", 1: "object", 2: "function", 3: "section", 4: "file"}


class Symbol(NamedTuple):
    """Name, binding and kind as in the tables above (else a number), bytes, whether something else must define it."""

    name: str
    binding: str
    kind: str
    num_bytes: int
    is_undefined: bool


def symbols(cubin: bytes) -> list[Symbol]:
    """All named symbols."""
    assert cubin[:6] == b"\x7fELF\x02\x01", "no ELF file of 64 bits"
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<2H", cubin, 0x3A)
    # name, type, flags, address, offset, bytes, link, info, alignment, bytes of an entry
    sections = [struct.unpack_from("<2I4Q2I2Q", cubin, start + i * size) for i in range(count)]
    found = []
    for _, kind, _, _, offset, num_bytes, link, _, _, entry_bytes in sections:
        if kind != _SYMBOL_TABLE:
            continue
        names = sections[link][4]
        for entry in range(offset, offset + num_bytes, entry_bytes):
            name, info, _, section, _, symbol_bytes = struct.unpack_from("<I2BH2Q", cubin, entry)
            text = cubin[names + name : cubin.index(b"\0", names + name)].decode()
            if text:
                binding, symbol_kind = _BINDINGS.get(info >> 4, str(info >> 4)), _KINDS.get(info & 15, str(info & 15))
                found.append(Symbol(text, binding, symbol_kind, symbol_bytes, section == 0))
    return found
