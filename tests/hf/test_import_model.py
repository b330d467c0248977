"""An imported model computes what the Hugging Face model computes, and exports to what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dyt.checkpoints.saved_args import find_checkpoint, saved_args
from megatron_dyt.checkpoints.torch_dist import TorchDistReader
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.checkpoint_model import load_model
from megatron_dyt.hf.directory import SafetensorsReader
from megatron_dyt.hf.export import Export, export
from megatron_dyt.hf.import_model import import_model
from tests.evaluation.conftest import fresh_megatron  # noqa: F401

from .conftest import HF_TOKENS, add_tokenizer, command, hf_directory

DYT: dict[str, Any] = {"embedding_scale": 2.5, "dyt_bias": True}


@pytest.mark.parametrize("dyt", [DYT | {"dyt_function": "erf", "qk_layernorm": True}, None])
def test_megatron_computes_the_same(
    tmp_path: Path,
    tokenizer_model: Path,
    fresh_megatron: None,  # noqa: F811
    dyt: dict[str, Any] | None,
) -> None:
    from megatron_dyt import cpu

    cpu.disable()
    theirs = hf_directory(tmp_path / "hf", dyt, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    add_tokenizer(tmp_path / "hf", tokenizer_model)
    command("import", "--load", tmp_path / "hf", "--save", tmp_path / "megatron")
    with torch.no_grad():
        expected = theirs(HF_TOKENS).logits
    cpu.enable()
    loaded = load_model(str(tmp_path / "megatron"))
    assert loaded.tokenizer.vocab_size == 350
    positions = torch.arange(16).expand(2, 16)
    mask = torch.ones(16, 16, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        ours = loaded.model(HF_TOKENS, positions, mask)
    assert expected.std() > 0.1
    assert (ours[..., :350] - expected).abs().max() < 1e-5 * max(1, float(expected.abs().max()))
    assert not ours[..., 350:].any()


VARIANTS: dict[str, dict[str, Any]] = {
    "DyT": {"dyt": DYT},
    "DyT without bias and scale, shared output": {
        "dyt": {"embedding_scale": None},
        "tie_word_embeddings": True,
    },
    "biases": {"dyt": DYT, "attention_bias": True, "mlp_bias": True},
    "bias of q, k, v": {"attention_bias": True, "num_key_value_heads": 4},
    "wide heads, scaled positions": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
    "LLaMA 3's rotary scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(tmp_path: Path, variant: str) -> None:
    model = hf_directory(tmp_path / "hf", **VARIANTS[variant])
    import_model(tmp_path / "hf", tmp_path / "megatron")
    checkpoint = find_checkpoint(str(tmp_path / "megatron"))
    args = saved_args(checkpoint)
    # Alpha itself is learned: what else comes from a preset is that of `paper`, not of the default.
    assert getattr(args, "dyt_preset", "paper") == "paper"
    export(Export(checkpoint, args, tmp_path / "again"))
    first, second = SafetensorsReader(tmp_path / "hf"), SafetensorsReader(tmp_path / "again")
    assert first.shapes.keys() == second.shapes.keys()
    for name in first.shapes:
        again = second.read(name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert again.shape == (384, 32)
            assert not again[350:].any()
            again = again[:350]
        assert torch.equal(first.read(name), again), name
    before, after = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("hf", "again"))
    for name in ("rope_parameters", "head_dim", "tie_word_embeddings", "num_key_value_heads", "rms_norm_eps"):
        assert after[name] == before[name], name
    for name in ("dyt_function", "dyt_bias", "embedding_scale", "attention_bias", "mlp_bias"):
        assert after.get(name) == before.get(name), name
    assert model.config.vocab_size == 350


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),  # and more: tests/test_llama.py
        ({"num_hidden_layers": 3}, r"model\.layers\.2\..* None instead of"),
        ({"intermediate_size": 64}, r"\(32, 48\) instead of \(32, 64\)"),
    ],
)
def test_what_cannot_be_imported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    hf_directory(tmp_path / "hf")
    change_config(tmp_path / "hf", **changes)
    with pytest.raises(UserError, match=message):
        import_model(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_bias_without_mlp_bias(tmp_path: Path) -> None:
    model = hf_directory(tmp_path / "hf", attention_bias=True)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.bias.fill_(0.5)
    model.save_pretrained(str(tmp_path / "hf"))
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.o_proj\.bias is not zero"):
        import_model(tmp_path / "hf", tmp_path / "out")


def test_tensors_that_older_files_hold_besides_the_model_s_are_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hf_directory(tmp_path / "hf", tie_word_embeddings=True)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    shared = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | shared | angles, file)
    import_model(tmp_path / "hf", tmp_path / "out")
    keys = TorchDistReader(tmp_path / "out" / "iter_0000001").tensors
    assert not [key for key in keys if "output_layer" in key or "rotary" in key]


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no readable config\.json"):
        import_model(tmp_path, tmp_path / "out")
    hf_directory(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        import_model(tmp_path / "hf", tmp_path / "out")
    (tmp_path / "hf" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors file"):
        import_model(tmp_path / "hf", tmp_path / "out")


def test_trains_on(
    tmp_path: Path, megatron_run: Callable[[list[str]], SimpleNamespace], tiny_llama: list[str]
) -> None:
    """Megatron's own loop takes the model over, and starts from its loss."""
    hf_directory(tmp_path / "hf", DYT, vocab_size=63, max_position_embeddings=32, intermediate_size=64)
    import_model(tmp_path / "hf", tmp_path / "megatron")
    argv = [*tiny_llama, "--train-iters", "2", "--load", str(tmp_path / "megatron"), "--finetune"]
    run = megatron_run([*argv, "--use-checkpoint-args", "--normalization", "DyT", "--lr", "1e-9"])
    table = SafetensorsReader(tmp_path / "hf").read("model.embed_tokens.weight")
    ours = run.model[0].module.embedding.word_embeddings.weight.detach()
    assert torch.allclose(ours[:63], table, atol=1e-6)
    assert len(run.losses) == 2
