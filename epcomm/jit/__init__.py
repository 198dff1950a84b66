"""From CUDA source text to loaded kernels. Knows nothing of MoE."""
