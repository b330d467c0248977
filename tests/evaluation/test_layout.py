"""Tensor-parallel size for an evaluation: as asked, the fewest that fit, or a clear error."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dyt import cpu
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation import layout

MODEL = Namespace(num_attention_heads=12, padded_vocab_size=512, bf16=True)


def choose(tp: int | None = None) -> int:
    return layout.choose(MODEL, Path("nowhere"), tp)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setattr(cpu, "is_enabled", lambda: False)
    return monkeypatch


def on_gpus(world: pytest.MonkeyPatch, gigabytes: float, weights: float) -> None:
    world.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=gigabytes * 1e9)
    world.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    world.setattr(layout, "weight_bytes", lambda *_: weights * 1e9)


def test_as_asked(world: pytest.MonkeyPatch) -> None:
    assert [choose(tp) for tp in (1, 2, 4)] == [1, 2, 4]


def test_without_gpus_each_process_holds_a_model(world: pytest.MonkeyPatch) -> None:
    world.setattr(torch.cuda, "is_available", lambda: False)
    assert choose() == 1


def test_fewest_whose_memory_suffices(world: pytest.MonkeyPatch) -> None:
    on_gpus(world, 80, weights=14)
    assert choose() == 1
    on_gpus(world, 80, weights=68)
    assert choose() == 2
    on_gpus(world, 80, weights=140)
    assert choose() == 4


@pytest.mark.parametrize(
    ("tp", "message"),
    [
        (3, r"3 does not divide the 16 processes; allowed here: 1, 2, 4\."),
        (8, r"8 does not divide the model \(12 attention heads.*16 processes: 1, 2, 4"),
    ],
)
def test_what_cannot_work(world: pytest.MonkeyPatch, tp: int, message: str) -> None:
    on_gpus(world, 80, weights=68)
    with pytest.raises(UserError, match=message):
        choose(tp)


@pytest.mark.parametrize(("groups", "allowed"), [(3, "1"), (12, "1, 2, 4"), (4, "1, 2, 4, 8, 16")])
def test_groups_of_attention_heads(world: pytest.MonkeyPatch, groups: int, allowed: str) -> None:
    """A rank has whole groups, or a group is on several ranks: one number divides the other."""
    model = Namespace(
        num_attention_heads=48, group_query_attention=True, num_query_groups=groups, padded_vocab_size=512
    )
    with pytest.raises(UserError, match=rf"32 does not divide.*allowed here: {allowed}\."):
        layout.choose(model, Path("nowhere"), 32)
    if groups == 3:
        with pytest.raises(UserError, match=r"does not divide the model \(48 attention heads in 3 groups, "):
            layout.choose(model, Path("nowhere"), 2)
    # Megatron's default for models without groups.
    model.group_query_attention, model.num_query_groups = False, 1
    assert layout.choose(model, Path("nowhere"), 16) == 16


def test_too_few_processes(world: pytest.MonkeyPatch) -> None:
    on_gpus(world, 24, weights=140)
    with pytest.raises(UserError, match=r"140\.0 GB, too much for 16 processes with 24 GB"):
        choose()
