"""What Megatron-FSDP finds on CPU. That it trains is in tests/distributed/cases.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from megatron_dyt.cpu import fsdp


def test_meshes_are_of_cpu_processes() -> None:
    seen: list[tuple[Any, ...]] = []
    original = SimpleNamespace(from_group=lambda *given, **options: seen.append((*given, options)))
    mesh = fsdp._on_cpu(original)
    mesh.from_group("groups", device_type="cuda", mesh_dim_names=["dp", "tp"])
    assert seen == [("groups", "cpu", {"mesh_dim_names": ["dp", "tp"]})]


def test_the_device_has_a_number_while_it_is_built() -> None:
    before = torch.cuda.current_device
    seen = []

    def init(_self: Any, text: str) -> None:
        seen.append(torch.device(f"{text}:{torch.cuda.current_device()}"))

    fsdp._with_a_numbered_device(init)(None, "cuda")
    assert seen == [torch.device("cuda:0")]
    assert torch.cuda.current_device is before
