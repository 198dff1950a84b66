"""What the stand-ins for CuPy and cuda-bindings share: a GPU whose memory is host memory and whose streams are threads.

Many processes may use it at once, as under MPS; what they share they share as on a GPU, by mapping memory.
"""
