"""An export computes what Megatron computes; it is complete or absent."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from megatron_dyt.checkpoints.torch_dist import LazyTensor, TorchDistReader, write_torch_dist
from megatron_dyt.config import DyTConfig
from megatron_dyt.errors import UserError
from megatron_dyt.hf import export as module
from megatron_dyt.hf.directory import SafetensorsReader
from megatron_dyt.mcore.norm import DyTNorm
from tests.data.samples import manifest

from .conftest import TOKENS, Saved, command, hf_logits, hf_model

Save = Callable[..., Saved]
TOLERANCE = 1e-5


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < TOLERANCE * max(1, float(theirs.abs().max()))


VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries, untied": {},
    "as many keys as queries, tied": {"num_query_groups": 4, "model": {"tied": True}},
    "bias": {"dyt": DyTConfig.unit(32, bias=True)},
    "erf, bias, queries and keys": {
        "dyt": DyTConfig.unit(32, bias=True, function="erf"),
        "qk_layernorm": True,
    },
    "isru, no scale, linear bias": {
        "dyt": DyTConfig.paper(32, function="isru", embedding_scale="none"),
        "add_bias_linear": True,
    },
    "bias, tied, bias of q, k, v": {
        "dyt": DyTConfig.unit(32, bias=True),
        "model": {"tied": True},
        "add_qkv_bias": True,
    },
    "log alpha, queries and keys": {"dyt": DyTConfig.auto(32, running_scale="none"), "qk_layernorm": True},
    "running scale, log alpha": {"dyt": DyTConfig.auto(32), "qk_layernorm": True},
    "running scale everywhere, log alpha": {
        "dyt": DyTConfig.auto(32, running_scale="all"),
        "qk_layernorm": True,
    },
    "running scale, alpha": {"dyt": DyTConfig.unit(32, running_scale="all")},
    "wide heads, other rotary base": {"kv_channels": 16, "model": {"rotary_base": 500}},
    "LLaMA 3's rotary scaling": {"model": {"rope_scaling": True}},
    "interpolated positions": {"model": {"seq_len_interpolation_factor": 2}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_dyt_logits(save_gpt: Save, tmp_path: Path, variant: str) -> None:
    saved = save_gpt("DyT", **VARIANTS[variant])
    theirs = saved.logits()
    assert_close(hf_logits(saved.export(tmp_path / "out")), theirs)
    assert_close(hf_logits(saved.export(tmp_path / "folded", fold_weight=True)), theirs)


RMS_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"layernorm_epsilon": 1e-2},
    "scaled embedding": {"scale": "sqrt"},
    "scaled and shared embedding": {"scale": "sqrt", "model": {"tied": True}},
    "linear bias": {"add_bias_linear": True},
}


@pytest.mark.parametrize("variant", RMS_VARIANTS)
def test_rmsnorm_logits_as_plain_llama(save_gpt: Save, tmp_path: Path, variant: str) -> None:
    saved = save_gpt("RMSNorm", **RMS_VARIANTS[variant])
    output = saved.export(tmp_path / "out")
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not list(output.glob("*.py"))
    assert not [name for name in tensor_names(output) if name.endswith("scale")]
    assert_close(hf_logits(output), saved.logits())


def test_folding_removes_the_weights(save_gpt: Save, tmp_path: Path) -> None:
    saved = save_gpt("DyT", dyt=DyTConfig.unit(32, bias=True), qk_layernorm=True)
    names = tensor_names(saved.export(tmp_path / "out", fold_weight=True))
    norms = {name for name in names if "norm" in name and not name.endswith("alpha")}
    # Between queries or keys and their product is no linear layer, and LLaMA's output layer has no bias.
    assert norms
    assert all(re.search(r"([qk]_norm|model\.norm)\.(weight|bias)$", name) for name in norms)
    assert "lm_head.bias" not in names
    assert "model.layers.1.mlp.gate_proj.bias" in names


@pytest.mark.parametrize(
    ("dyt", "tied"),
    [(DyTConfig.paper(32, embedding_scale="none"), True), (DyTConfig.unit(32, bias=True), False)],
)
def test_final_dyt_stays_where_the_output_layer_has_no_place_for_it(
    save_gpt: Save, tmp_path: Path, dyt: DyTConfig, tied: bool
) -> None:
    saved = save_gpt("DyT", dyt=dyt, model={"tied": tied})
    output = saved.export(tmp_path / "out", fold_weight=True)
    names = tensor_names(output)
    assert "model.norm.weight" in names
    assert ("lm_head.weight" in names) != tied
    assert json.loads((output / "config.json").read_text())["dyt_folded"] == ["attn", "ffn"]


@pytest.mark.parametrize("tied", [True, False])
def test_folding_takes_the_embedding_scale(save_gpt: Save, tmp_path: Path, tied: bool) -> None:
    """vLLM and SGLang put a plain embedding in its place."""
    saved = save_gpt("DyT", dyt=DyTConfig.paper(32), model={"tied": tied})
    output = saved.export(tmp_path / "out", fold_weight=True)
    assert not tensor_names(output) & {"model.embed_tokens.scale", "model.norm.weight"}
    config = json.loads((output / "config.json").read_text())
    assert config["embedding_scale"] is None
    assert not config["tie_word_embeddings"]


def test_an_export_that_a_backend_cannot_serve_says_so(
    save_gpt: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(name: str, dyt: DyTConfig, **options: Any) -> str:
        caplog.clear()
        save_gpt("DyT", dyt=dyt).export(tmp_path / name, **options)
        return " ".join(record.message for record in caplog.records if record.levelname == "WARNING")

    scaled = DyTConfig.paper(32)
    said = warnings("scaled", scaled)
    assert "SGLang cannot serve this export" in said
    assert "export with --fold-weight" in said
    assert "SGLang" not in warnings("folded", scaled, fold_weight=True)
    assert "SGLang" not in warnings("no scale", DyTConfig.paper(32, embedding_scale="none"))


def tensor_names(output: Path) -> set[str]:
    return set(SafetensorsReader(output).shapes)


def test_shards_and_dtype(save_gpt: Save, tmp_path: Path) -> None:
    saved = save_gpt("DyT")
    whole = SafetensorsReader(saved.export(tmp_path / "whole"))
    output = saved.export(tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=10_000)
    shards = SafetensorsReader(output)
    for name in whole.shapes:
        assert torch.equal(shards.read(name), whole.read(name).bfloat16()), name
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 3
    assert max(path.stat().st_size for path in files) < 10_000 + 2_000  # and a header
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert set(index["weight_map"]) == set(whole.shapes)
    assert index["metadata"]["total_size"] == 2 * sum(whole.read(name).numel() for name in whole.shapes)
    ours, theirs = hf_logits(output, dtype="auto"), saved.logits()
    assert ours.dtype == torch.bfloat16
    assert 1e-4 < (ours.float() - theirs).abs().max() / theirs.abs().max() < 0.05


def test_alpha_of_a_bf16_run_is_rounded_once(save_gpt: Save, tmp_path: Path) -> None:
    """It is computed in fp32, of a bf16 logarithm and an fp32 average, in training too."""
    saved = save_gpt("DyT", dyt=DyTConfig.auto(32, running_scale="all"), params_dtype=torch.bfloat16)
    norms = [module for module in saved.model.modules() if isinstance(module, DyTNorm)]
    trained = sorted(float(norm.effective_alpha().detach()) for norm in norms)
    for dtype in (torch.float32, torch.bfloat16):
        reader = SafetensorsReader(saved.export(tmp_path / str(dtype), dtype=dtype))
        alphas = torch.cat([reader.read(name) for name in reader.shapes if name.endswith("alpha")])
        assert alphas.dtype == dtype
        assert sorted(alphas.tolist()) == pytest.approx(torch.tensor(trained).to(dtype).tolist(), rel=1e-6)


def test_layers_stored_one_by_one(save_gpt: Save, tmp_path: Path) -> None:
    """What Megatron writes for layers that differ from each other."""
    saved = save_gpt("DyT")
    reader = TorchDistReader(saved.checkpoint.directory)
    tensors: dict[str, LazyTensor] = {}
    for key, (size, dtype) in reader.tensors.items():
        layers = range(size[0]) if key.startswith("decoder.layers.") else [None]
        for layer in layers:
            name = key if layer is None else key.replace("layers.", f"layers.{layer}.")
            value = reader.read(key, layer)
            tensors[name] = LazyTensor(tuple(value.shape), dtype, [lambda value=value: value])
    directory = tmp_path / "single" / "iter_0000007"
    write_torch_dist(directory, tensors, {"args": saved.args})
    single = replace(saved, checkpoint=replace(saved.checkpoint, directory=directory))
    ours = hf_logits(single.export(tmp_path / "out"))
    assert torch.equal(ours, hf_logits(saved.export(tmp_path / "usual")))


# --- the whole command ----------------------------------------------------------------------------


def with_tokenizer(model: Path, **more: Any) -> dict[str, Any]:
    """Arguments of a run with a SentencePiece tokenizer."""
    return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": str(model)} | more


@pytest.fixture
def tokenized(save_gpt: Save, tokenizer_model: Path) -> Saved:
    """A model of the tokenizer's vocabulary, padded."""
    args = with_tokenizer(tokenizer_model, padded_vocab_size=384)
    return save_gpt("DyT", args=args, model={"vocab_size": 384})


def run_card(directory: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the card's example leaves, where our classes are not registered and nobody answers questions."""
    from transformers import CONFIG_MAPPING, dynamic_module_utils

    modules = str(directory.parent / "modules")
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "llama_dyt", raising=False)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
    monkeypatch.syspath_prepend(modules)
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail(f"asks on the terminal: {text}"))
    found: dict[str, Any] = {"DIRECTORY": str(directory)}
    exec((directory / "README.md").read_text().split("```python\n")[1].split("```")[0], found)
    return found


def test_command_with_tokenizer(
    tokenized: Saved,
    tmp_path: Path,
    tokenizer_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "new" / "out"
    command("export", "--load", tokenized.checkpoint.root, "--output", output, "--max-shard-size", "40KB")
    assert "exported" in capsys.readouterr().out
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "generation_config.json", "README.md", "modeling_llama_dyt.py"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} <= names
    assert "model.safetensors.index.json" in names
    config = json.loads((output / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (350, 1, 2)
    assert_close(hf_logits(output), tokenized.logits()[..., :350])
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "| vocabulary, positions | 350, 16 |" in (output / "README.md").read_text()
    loaded = run_card(output, monkeypatch)
    assert type(loaded["model"]).__module__.startswith("transformers_modules.")
    assert loaded["tokenizer"]("The").input_ids[0] == 1


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    save_gpt: Save, tmp_path: Path, tokenizer_model: Path
) -> None:
    saved = save_gpt("DyT", args=with_tokenizer(tokenizer_model))
    words = ["export", "--load", saved.checkpoint.root, "--output", tmp_path / "new" / "out"]
    with pytest.raises(UserError, match=r"has 350 tokens, but the model in .* at most 64"):
        command(*words)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_tokenizer_with_fewer_tokens_than_the_run_s_is_refused(
    save_gpt: Save, tmp_path: Path, tokenizer_model: Path
) -> None:
    """It would lose rows of the embedding; but those that Megatron pads with are no loss."""
    args = with_tokenizer(tmp_path / "moved.model", padded_vocab_size=384, make_vocab_size_divisible_by=32)
    saved = save_gpt("DyT", args=args, model={"vocab_size": 384})
    words = ["export", "--load", saved.checkpoint.root, "--output", tmp_path / "new" / "out"]
    with pytest.raises(UserError, match=r"has 350 tokens, too few for the 384 .*a multiple of 32\)"):
        command(*words, "--tokenizer-model", tokenizer_model)
    assert list((tmp_path / "new").iterdir()) == []
    saved.args.make_vocab_size_divisible_by = 64
    saved.export(tmp_path / "out", tokenizer_model=str(tokenizer_model))


def test_a_tokenizer_that_the_data_were_not_made_with_is_refused(tokenized: Saved, tmp_path: Path) -> None:
    manifest("0" * 64).write(tmp_path / "train")
    tokenized.args.data_path = [str(tmp_path / "train")]
    with pytest.raises(UserError, match=r"not the one that the training data was made with \(0{12}"):
        tokenized.export(tmp_path / "out")


def test_a_tokenizer_for_a_run_without_one(
    save_gpt: Save, tmp_path: Path, tokenizer_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CONFIG_MAPPING, AutoTokenizer

    args = {"padded_vocab_size": 384, "make_vocab_size_divisible_by": 128}
    saved = save_gpt("DyT", args=args, model={"vocab_size": 384})
    words = ["export", "--load", saved.checkpoint.root, "--output"]
    command(*words, tmp_path / "first", "--tokenizer-model", tokenizer_model)
    # Of a directory with code, which transformers asks about where our classes are not registered.
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "llama_dyt", raising=False)
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail(f"asks on the terminal: {text}"))
    command(*words, tmp_path / "second", "--tokenizer-model", tmp_path / "first")
    for name in ("first", "second"):
        assert AutoTokenizer.from_pretrained(str(tmp_path / name))("The")["input_ids"][0] == 1
        assert json.loads((tmp_path / name / "config.json").read_text())["vocab_size"] == 350
    with pytest.raises(UserError, match=r"--no-bos: the run had no tokenizer; give one with"):
        command(*words, tmp_path / "out", "--no-bos")
    with pytest.raises(UserError, match=r"no.json: the run had no tokenizer; give a SentencePiece model"):
        command(*words, tmp_path / "out", "--tokenizer-model", "no.json")


def test_options_that_contradict_each_other(tmp_path: Path) -> None:
    words = ["export", "--load", tmp_path, "--output", tmp_path / "out"]
    with pytest.raises(click.UsageError, match="which --no-tokenizer leaves out"):
        command(*words, "--no-tokenizer", "--no-bos")
    with pytest.raises(click.UsageError, match=r"--tokenizer-model .* which --no-tokenizer leaves out"):
        command(*words, "--no-tokenizer", "--tokenizer-model", "t.model")
    with pytest.raises(click.UsageError, match="give a size such as"):
        command(*words, "--max-shard-size", "5GiB")


def test_transformers_uses_an_export_as_its_own(tokenized: Saved, tmp_path: Path) -> None:
    """Shards, dtype on load, SDPA, the key-value cache, and a generation that ends at the tokenizer's EOS."""
    output = tokenized.export(tmp_path / "out", max_shard_bytes=40_000)
    assert len(list(output.glob("*.safetensors"))) > 1

    half = hf_model(output, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    model, eager = hf_model(output), hf_model(output, attn_implementation="eager")
    assert (model.config._attn_implementation, eager.config._attn_implementation) == ("sdpa", "eager")
    with torch.no_grad():
        whole = model(TOKENS).logits
        assert torch.allclose(eager(TOKENS).logits, whole, atol=1e-5 * float(whole.abs().max()))
        assert (half(TOKENS).logits.float() - whole).abs().max() < 0.05 * whole.abs().max()

    free = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(TOKENS[:1, :4], **free)
    assert torch.equal(cached, model.generate(TOKENS[:1, :4], use_cache=False, **free))
    # The sixth token of that text is made the one after which a text ends.
    settings = json.loads((output / "generation_config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (1, 2)
    end = int(cached[0, 5])
    (output / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": end}))
    first = cached[0].tolist().index(end, 4)
    ended = hf_model(output).generate(TOKENS[:1, :4], max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert torch.equal(ended, cached[:, : first + 1])


def test_texts_generated_together_are_those_generated_one_by_one(tokenized: Saved, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    output = tokenized.export(tmp_path / "out")
    model, tokenizer = hf_model(output), AutoTokenizer.from_pretrained(str(output), trust_remote_code=True)
    texts = ["a", "Permission is", "The work"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), **options)
    assert (together == tokenizer.pad_token_id).any()
    for text, ids in zip(texts, together, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)[0]
        assert ids[-len(alone) :].tolist() == alone.tolist()
        assert set(ids[: -len(alone)].tolist()) <= {tokenizer.pad_token_id}


def test_failure_leaves_nothing(save_gpt: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_gpt("DyT")
    monkeypatch.setattr(module, "write_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        saved.export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_output_in_use(save_gpt: Save, tmp_path: Path) -> None:
    saved = save_gpt("DyT")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match=r"--output .*out is a directory that is not empty"):
        saved.export(tmp_path / "out")
    assert (tmp_path / "out" / "mine").exists()


def test_no_room(save_gpt: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_gpt("DyT")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9_000, 0, 9_000))
    with pytest.raises(UserError, match=r"are needed and 0\.0 GB are free"):
        saved.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what has no Hugging Face form ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": 3}, r"Of another shape: .*\(2, .* instead of \(3, "),
        ({"dyt_bias": True}, r"Missing: .*bias"),
        ({"add_bias_linear": True}, r"Missing: .*linear_"),
        ({"embedding_scale": "none"}, r"Unknown: embedding\.embedding_scale\.scale"),
        ({"normalization": "RMSNorm"}, r"Unknown: .*alpha"),
    ],
)
def test_tensors_that_the_arguments_do_not_describe(
    save_gpt: Save, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    saved = save_gpt("DyT")
    for name, value in changed.items():
        setattr(saved.args, name, value)
    with pytest.raises(UserError, match=message):
        saved.export(tmp_path / "out")


def test_rmsnorm_cannot_be_folded(save_gpt: Save, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--fold-weight is for DyT"):
        save_gpt("RMSNorm").export(tmp_path / "out", fold_weight=True)
