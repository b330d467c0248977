from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron_dyt.checkpoints.iterations import DamagedCheckpoint
from megatron_dyt.config import DyTConfig
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import checkpoint

Make = Callable[..., Any]


def load(model: Any, directory: Path, **options: Any) -> None:
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(directory), **options)
    model.load_state_dict(state["model"])


def test_a_dyt_model_comes_back(make_config: Make, build_gpt: Make, save_model: Make, tmp_path: Path) -> None:
    saved = build_gpt(make_config(qk_layernorm=True))
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter += torch.rand_like(parameter)
    save_model(saved, tmp_path / "c")
    fresh = build_gpt(make_config(qk_layernorm=True))
    load(fresh, tmp_path / "c")
    for (name, new), old in zip(fresh.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(new, old), name


def test_a_strictness_that_megatron_fails_at_is_refused(
    make_config: Make, build_gpt: Make, save_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_gpt(make_config())
    save_model(model, tmp_path / "c")
    monkeypatch.setattr(TensorProperties, "strides", None, raising=False)  # torch 2.15 has them.
    with pytest.raises(UserError, match=r"--dist-ckpt-strictness log_all was given.*Leave the flag out"):
        load(model, tmp_path / "c", strict="log_all")
    load(model, tmp_path / "c")


@pytest.mark.parametrize("strict", ["assume_ok_unexpected", "log_all"])
def test_an_rmsnorm_checkpoint_does_not_load_into_dyt(
    make_config: Make, build_gpt: Make, save_model: Make, tmp_path: Path, strict: str
) -> None:
    save_model(build_gpt(make_config("RMSNorm")), tmp_path / "c")
    model = build_gpt(make_config())
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match="holds a LayerNorm or RMSNorm model and this one is DyT"):
        load(model, tmp_path / "c", strict=strict)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("saved", "loading", "words"),
    [
        ({"name": "RMSNorm"}, {}, "holds a LayerNorm or RMSNorm model and this one is DyT"),
        ({}, {"name": "RMSNorm"}, "holds a DyT model and this one is not"),
        ({}, {"dyt": DyTConfig.unit(32, running_scale="all")}, "The DyT settings differ"),
    ],
)
def test_the_torch_format_is_refused_though_megatron_loads_a_second_time(
    make_config: Make, build_gpt: Make, saved: Any, loading: Any, words: str
) -> None:
    state, model = build_gpt(make(make_config, **saved)).state_dict(), build_gpt(make(make_config, **loading))

    def megatrons(chunks: list[Any]) -> None:
        try:
            chunks[0].load_state_dict(state)
        except Exception:
            chunks[0].load_state_dict(state, strict=False)

    with pytest.raises(UserError, match=words):
        checkpoint.wrap_load_checkpoint(megatrons)([model])
    megatrons([model])  # The hooks are gone.


def test_state_of_transformer_engine_may_be_missing_in_the_torch_format(
    make_config: Make, build_gpt: Make
) -> None:
    model = build_gpt(make_config())
    state = model.state_dict() | {"decoder.final_layernorm._extra_state": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="_extra_state"):
        checkpoint.wrap_load_checkpoint(lambda chunks: chunks[0].load_state_dict(state))([model])


def make(make_config: Make, name: str = "DyT", dyt: DyTConfig | None = None) -> Any:
    config = make_config(name)
    if name == "DyT":
        config.dyt = dyt or DyTConfig.unit(32)
    return config


@pytest.mark.parametrize("strict", ["assume_ok_unexpected", "ignore_all"])
def test_a_dyt_checkpoint_does_not_load_into_rmsnorm(
    make_config: Make, build_gpt: Make, save_model: Make, tmp_path: Path, strict: str
) -> None:
    save_model(build_gpt(make_config()), tmp_path / "c")
    with pytest.raises(UserError, match="holds a DyT model and this one is not") as error:
        load(build_gpt(make_config("RMSNorm")), tmp_path / "c", strict=strict)
    assert "layer_norm_log_alpha" in str(error.value)


def test_other_dyt_settings_are_named(
    make_config: Make, build_gpt: Make, save_model: Make, tmp_path: Path
) -> None:
    save_model(build_gpt(make_config()), tmp_path / "c")
    config = make_config()
    config.dyt = DyTConfig.paper(32, bias=True)
    with pytest.raises(UserError, match=r"The DyT settings differ.*Missing in the checkpoint: .*bias"):
        load(build_gpt(config), tmp_path / "c")


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (".metadata", r"metadata of checkpoint .*c cannot be read .*--ckpt-step"),
        ("*.distcp", r"is truncated: \d+ of \d+ bytes.*--dyt-load-fallback"),
    ],
)
def test_a_cut_off_file_is_named(
    make_config: Make, build_gpt: Make, save_model: Make, tmp_path: Path, damaged: str, message: str
) -> None:
    save_model(build_gpt(make_config()), tmp_path / "c")
    for file in (tmp_path / "c").glob(damaged):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DamagedCheckpoint, match=message):
        load(build_gpt(make_config()), tmp_path / "c")


def test_architecture_differences_are_told_unless_strictness_was_chosen() -> None:
    model, saved = {"head.weight", "norm.weight"}, {"norm.weight"}
    with pytest.raises(UserError, match="Check the architecture flags"):
        checkpoint.compare(model, saved, "c")
    checkpoint.compare(model, saved, "c", norms_only=True)
    with pytest.raises(UserError, match=r"Not in the model: norm\.weight"):
        checkpoint.compare({"a"}, {"a", "norm.weight"}, "c", norms_only=True)
    with pytest.raises(UserError, match=r"Missing in the checkpoint: vision_model\.ln_pre\.bias"):
        checkpoint.compare({"vision_model.ln_pre.bias"}, set(), "c", norms_only=True)
    checkpoint.compare(saved, saved, "c")


def test_long_lists_are_cut_and_dyt_comes_first() -> None:
    missing = {f"a{i}" for i in range(6)} | {"z.alpha"}
    with pytest.raises(UserError, match=r"z\.alpha, a0, a1, a2 and 3 more"):
        checkpoint.compare(missing, set(), "c")


def test_loading_something_without_a_model_is_not_checked() -> None:
    assert list(checkpoint.model_tensor_keys({"optimizer": {}, "args": 1})) == []
    assert list(checkpoint.model_tensor_keys([1])) == []


def test_all_virtual_stages_count(make_config: Make, build_gpt: Make) -> None:
    model = build_gpt(make_config())
    keys = set(checkpoint.model_tensor_keys({"model0": model.sharded_state_dict(), "model1": []}))
    assert "decoder.final_layernorm.log_alpha" in keys
    assert "embedding.embedding_scale.scale" in keys


def test_a_changed_function_is_refused_though_the_keys_agree() -> None:
    saved, now = SimpleNamespace(dyt_function="hardtanh"), SimpleNamespace(dyt_function="tanh")
    with pytest.raises(UserError, match="trained with --dyt-function hardtanh, and this run has tanh"):
        checkpoint.compare_function(now, saved, "c")
    checkpoint.compare_function(now, now, "c")
    checkpoint.compare_function(None, saved, "c")
    checkpoint.compare_function(now, None, "c")


# --- places of parameters in joined buckets; what it is for is in tests/distributed/test_checkpoints.py ----


def buffer() -> Any:
    """Bucket 0 has 100 elements and is padded to 128, bucket 1 65 of 128, bucket 2 128 of 128."""
    starts = {
        "a": (0, 64, 0),
        "b": (64, 100, 0),
        "alpha": (128, 129, 1),
        "c": (192, 193, 1),
        "d": (256, 384, 2),
    }
    buckets = [SimpleNamespace(offset=128 * i, numel_unpadded=n) for i, n in enumerate((100, 65, 128))]
    return SimpleNamespace(param_index_map=starts, buckets=buckets)


def test_padding_at_the_end_of_buckets_is_left_out_and_no_other() -> None:
    assert checkpoint.unpadded_places(buffer()) == {
        "a": (0, 64, 0),
        "b": (64, 100, 0),
        "alpha": (100, 101, 1),
        "c": (164, 165, 1),
        "d": (165, 293, 2),
    }


def test_the_places_are_put_back() -> None:
    optimizer = SimpleNamespace(buffers=[buffer()])
    before = optimizer.buffers[0].param_index_map

    def fail(self: Any) -> None:
        assert self.buffers[0].param_index_map["alpha"] == (100, 101, 1)
        raise KeyError

    with pytest.raises(KeyError):
        checkpoint.wrap_sharded_state(fail)(optimizer)
    assert optimizer.buffers[0].param_index_map is before
