"""A Megatron world of one process, on a GPU or through the CPU runtime, with the plugin on."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from megatron_dyt import cpu


@contextmanager
def one_process_world(device: str) -> Iterator[None]:
    """Plugin registered and model parallel groups of size 1; everything is undone at the end."""
    with ExitStack() as stack:
        if device == "cpu":
            cpu.enable()  # before Megatron is imported
            stack.callback(cpu.disable)
        from megatron.core import parallel_state

        import megatron_dyt
        from megatron_dyt.mcore.register import unregister

        megatron_dyt.register()
        stack.callback(unregister)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        torch.distributed.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            init_method=f"file://{directory / 'store'}",
            rank=0,
            world_size=1,
        )
        stack.callback(torch.distributed.destroy_process_group)
        parallel_state.initialize_model_parallel()
        stack.callback(parallel_state.destroy_model_parallel)
        yield
