"""`python -m megatron_dyt COMMAND`, for torchrun; otherwise the console script `megatron-dyt` is shorter."""

from megatron_dyt.cli import entry

if __name__ == "__main__":
    entry()
