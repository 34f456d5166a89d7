"""The Triton kernels of the ops of `rankloom.kernels`, by family."""
