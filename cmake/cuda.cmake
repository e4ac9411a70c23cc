# The CUDA module: see csrc/cuda.
