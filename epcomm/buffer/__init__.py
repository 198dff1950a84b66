"""Buffer: the public object."""

from epcomm.buffer.buffer import Buffer

__all__ = ["Buffer"]
