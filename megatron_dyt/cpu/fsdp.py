"""Megatron-FSDP on CPU: it names CUDA for its device mesh, and its device by number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from megatron_dyt.patching import Patches, Replacement

_ADAPTER = "megatron.core.distributed.fsdp.mcore_fsdp_adapter"


def rows() -> list[Replacement]:
    """For the table of `cpu.replacements`."""
    return [
        Replacement(_ADAPTER, "DeviceMesh", _on_cpu),
        Replacement(_ADAPTER, "FullyShardedDataParallel.__init__", _with_a_numbered_device),
    ]


def _on_cpu(mesh: Any) -> SimpleNamespace:
    """All that the adapter uses of the class: meshes made of process groups."""

    def from_group(group: Any, device_type: str, **options: Any) -> Any:
        return mesh.from_group(group, "cpu" if device_type == "cuda" else device_type, **options)

    return SimpleNamespace(from_group=from_group)


def _with_a_numbered_device(init: Callable[..., None]) -> Callable[..., None]:
    """It writes f"cuda:{torch.cuda.current_device()}", so the current device must be a number while it is
    built; what is placed on the device of that number is placed on the CPU (`cpu.replacements`)."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        numbered = Patches()
        numbered.apply([Replacement("torch.cuda", "current_device", lambda _original: lambda: 0)])
        try:
            init(self, *args, **kwargs)
        finally:
            numbered.undo()

    return __init__
