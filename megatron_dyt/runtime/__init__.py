"""Where Megatron runs: on CUDA devices, or without any on CPU processes."""
