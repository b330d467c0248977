"""The Bridge example sets, of Bridge's plain GPT recipe, what a recipe of ours says, and nothing unknown."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_dyt import recipes
from tests.mcore.conftest import world
from tests.test_bridge import bridge

__all__ = ["bridge", "world"]  # fixtures


class Section:
    """A part of Bridge's ConfigContainer: has the attributes that Bridge's has, and takes no other."""

    def __init__(self, *names: str) -> None:
        vars(self).update(dict.fromkeys(names))

    def __setattr__(self, name: str, value: object) -> None:
        if name not in vars(self):
            raise AttributeError(f"Bridge has no {name}")
        vars(self)[name] = value


def plain_config() -> Section:
    """As megatron-bridge 0.6.2's `vanilla_gpt_pretrain_config()`; what the example may touch of it."""
    sections = {
        "train": ("train_iters", "global_batch_size", "micro_batch_size"),
        "optimizer": ("lr", "min_lr", "adam_beta1", "adam_beta2", "weight_decay", "clip_grad"),
        "scheduler": ("start_weight_decay", "end_weight_decay", "lr_warmup_iters"),
        "ddp": ("use_distributed_optimizer",),
        "dataset": ("seq_length", "blend"),
        "tokenizer": ("tokenizer_type", "tokenizer_model", "vocab_size"),
        "checkpoint": ("save", "load"),
    }
    config = Section("model", *sections)
    for name, attributes in sections.items():
        setattr(config, name, Section(*attributes))
    return config


@pytest.fixture
def example(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    recipe = ModuleType("megatron.bridge.recipes.gpt")
    vars(recipe)["vanilla_gpt_pretrain_config"] = plain_config
    monkeypatch.setitem(sys.modules, "megatron.bridge.recipes", ModuleType("megatron.bridge.recipes"))
    monkeypatch.setitem(sys.modules, recipe.__name__, recipe)
    sys.modules.pop("examples.bridge.pretrain_llama", None)
    yield importlib.import_module("examples.bridge.pretrain_llama")
    sys.modules.pop("examples.bridge.pretrain_llama", None)


@pytest.mark.parametrize("size", recipes.names())
@pytest.mark.parametrize("norm", ["DyT", "RMSNorm"])
def test_every_recipe(example: ModuleType, size: str, norm: str, tmp_path: Path) -> None:
    argv = ["--size", size, "--norm", norm, "--save", str(tmp_path), "--tensor-parallel", "2"]
    cfg = example.config(example.parse(argv))
    cfg.model.finalize()
    recipe = recipes.load(size)
    assert (cfg.model.normalization, cfg.model.tensor_model_parallel_size) == (norm, 2)
    assert cfg.model.sequence_parallel
    assert cfg.model.num_layers == recipe.num_layers
    assert (cfg.optimizer.lr, cfg.optimizer.min_lr) == (recipe.lr, recipe.lr * recipe.min_lr_ratio)
    assert cfg.scheduler.end_weight_decay == cfg.optimizer.weight_decay == recipe.weight_decay
    assert cfg.dataset.seq_length == cfg.model.seq_length == recipe.seq_length
    assert (cfg.dataset.blend, cfg.checkpoint.load) == (None, str(tmp_path))


def test_the_rmsnorm_twin_starts_at_the_scale_of_the_preset(example: ModuleType, tmp_path: Path) -> None:
    from megatron_dyt.mcore.model_config import initial_embedding_scale

    scales = {}
    for size in ("350m", "7b"):
        for norm in ("DyT", "RMSNorm"):
            cfg = example.config(example.parse(["--size", size, "--norm", norm, "--save", str(tmp_path)]))
            cfg.model.finalize()
            scales[size, norm] = initial_embedding_scale(cfg.model)
    assert scales == {
        ("350m", "DyT"): 50.0,
        ("350m", "RMSNorm"): 50.0,
        ("7b", "DyT"): 64.0,
        ("7b", "RMSNorm"): None,  # the paper's baseline has none
    }


def test_data_and_tokenizer(example: ModuleType, tmp_path: Path) -> None:
    argv = ["--save", str(tmp_path), "--data", "a", "b", "--tokenizer", "t.model", "--tensor-parallel", "1"]
    cfg = example.config(example.parse(argv))
    assert cfg.dataset.blend == (["a", "b"], None)
    assert (cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model) == (
        "SentencePieceTokenizer",
        "t.model",
    )
    assert not cfg.model.sequence_parallel
