"""Stand-in for cuda-bindings, on a GPU that is emulated."""

__version__ = "13.0.0"
