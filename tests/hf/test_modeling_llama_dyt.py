"""The model class against the reference, and as transformers uses it."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dyt.config import Function
from megatron_dyt.hf import modeling_llama_dyt
from megatron_dyt.hf.modeling_llama_dyt import (
    FUNCTIONS,
    LlamaDyT,
    LlamaDyTConfig,
    LlamaDyTForCausalLM,
    LlamaDyTModel,
)
from megatron_dyt.ops.reference import dyt_forward

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "embedding_scale": 2.0,
}
TOKENS = torch.arange(2 * 12).reshape(2, 12) * 5 % 64


def small_model(**settings: Any) -> LlamaDyTForCausalLM:
    torch.manual_seed(3)
    return LlamaDyTForCausalLM(LlamaDyTConfig(**(SMALL | settings))).eval()


def test_functions_are_all_there() -> None:
    assert set(FUNCTIONS) == set(Function.__args__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_dyt_is_the_reference(function: str, dtype: torch.dtype) -> None:
    config = LlamaDyTConfig(**SMALL, dyt_function=function, dyt_bias=True)
    dyt = LlamaDyT(config, "attn", 32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in dyt.parameters():
            parameter.normal_()
    dyt = dyt.to(dtype)
    x = (torch.randn(3, 5, 32) * 4).to(dtype)
    expected = dyt_forward(x, dyt.alpha, dyt.weight, dyt.bias, function=function, shift=dyt.shift)
    assert dyt(x).dtype == dtype
    assert torch.equal(dyt(x), expected)


def test_initial_values() -> None:
    alphas = {"attn": 0.7, "ffn": 0.3, "final": 0.1, "qk": 1.5}
    weights = {"ffn": 2.5}
    model = small_model(
        dyt_alpha_init=alphas, dyt_weight_init=weights, qk_layernorm=True, dyt_function="erf", dyt_bias=True
    )
    layer = model.model.layers[1]
    sites = {
        "attn": layer.input_layernorm,
        "ffn": layer.post_attention_layernorm,
        "final": model.model.norm,
        "qk": layer.self_attn.k_norm,
    }
    for role, site in sites.items():
        assert float(site.alpha) == pytest.approx(alphas[role])
        assert torch.equal(site.weight, torch.full_like(site.weight, weights.get(role, 1.0)))
        assert not site.bias.any()
        assert not site.shift.any()
    assert sites["qk"].weight.shape == (8,)
    assert float(model.model.embed_tokens.scale) == 2.0
    assert small_model(embedding_scale=None).model.embed_tokens.scale is None


def test_default_configuration_is_the_paper_s_7b() -> None:
    from megatron_dyt.config import DyTConfig

    config = LlamaDyTConfig()
    paper = DyTConfig.paper(config.hidden_size)
    assert config.dyt_alpha_init == {role: paper.alpha(role) for role in ("attn", "ffn", "final", "qk")}
    assert config.embedding_scale == config.hidden_size**0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dyt_function": "cos"}, "dyt_function is 'cos'; allowed: tanh"),
        ({"dyt_alpha_init": {"mlp": 1.0}}, r"unknown DyT role \['mlp'\]"),
        ({"dyt_folded": ["qk"]}, "no linear layer behind"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaDyTConfig(**(SMALL | settings))


@pytest.mark.parametrize("qk", [False, True])
def test_cache_attention_and_dtype(tmp_path: Path, qk: bool) -> None:
    model = small_model(qk_layernorm=qk)
    with torch.no_grad():
        whole = model(TOKENS).logits
        begun = model(TOKENS[:, :7], use_cache=True)
        rest = model(TOKENS[:, 7:], past_key_values=begun.past_key_values).logits
        assert torch.allclose(rest, whole[:, 7:], atol=1e-5)
        model.set_attn_implementation("eager")
        eager = model(TOKENS, output_attentions=True, output_hidden_states=True)
        assert torch.allclose(eager.logits, whole, atol=1e-5)
        assert len(eager.attentions) == 2
        assert len(eager.hidden_states) == 3
    model.save_pretrained(str(tmp_path))
    half = LlamaDyTForCausalLM.from_pretrained(str(tmp_path), dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    again = LlamaDyTForCausalLM.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.allclose(again(TOKENS).logits, whole, atol=1e-6)
        assert (half(TOKENS).logits.float() - whole).abs().max() < 0.05 * whole.abs().max()


def test_generate_continues_greedily() -> None:
    model = small_model()
    start = TOKENS[1:, :4]
    made = model.generate(start, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    tokens = start
    with torch.no_grad():
        for _ in range(6):
            tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(made, tokens)
    assert len(made[0].unique()) > 4


def test_padded_batch() -> None:
    """Left padding does not change a row, as lm-eval's and generation's batches need."""
    model = small_model(qk_layernorm=True)
    row = TOKENS[:1, :8]
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), row), dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 8])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
        assert torch.allclose(ours, model(row).logits, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("qk", [False, True])
def test_generation_with_cache_is_that_without(qk: bool, attention: str) -> None:
    """A left-padded batch, greedily: the same tokens, and logits that differ by rounding alone."""
    model = small_model(qk_layernorm=qk, dyt_weight_init={"final": 20.0})
    model.set_attn_implementation(attention)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, uncached = (
        model.generate(
            TOKENS,
            attention_mask=mask,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.allclose(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4)


def test_attention_refuses_a_decoder_layer_that_hands_on_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers would drop it, and with it the cache under another name."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, hidden_states, kv_store: None)
    with pytest.raises(
        TypeError, match=r"transformers .* gives kv_store to an attention that takes .*hidden"
    ):
        small_model()


def test_attention_is_that_of_the_attention_interface_with_its_keywords() -> None:
    """vLLM and SGLang put their own function there, and SGLang's takes keywords of its own."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layers = []

    def attention(module: Any, *args: Any, forward_batch: object, **kwargs: Any) -> Any:
        layers.append((module.layer_idx, forward_batch))
        return sdpa_attention_forward(module, *args, **kwargs)

    model = small_model(qk_layernorm=True)
    with torch.no_grad():
        expected = model(TOKENS).logits
        AttentionInterface.register("serving", attention)
        model.config._attn_implementation = "serving"
        found = model.model(
            TOKENS, position_ids=torch.arange(12)[None], use_cache=False, return_dict=False, forward_batch=7
        )
        assert torch.allclose(model.lm_head(found[0]), expected, atol=1e-6)
    assert layers == [(0, 7), (1, 7)]
    # vLLM reads the source of the class's forward for this call.
    assert "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(
        inspect.unwrap(type(model.model.layers[0].self_attn).forward)
    )
    assert type(model)._supports_attention_backend


def test_training_reaches_every_parameter() -> None:
    model = small_model(dyt_function="erf", dyt_bias=True, qk_layernorm=True).train()
    model(TOKENS, labels=TOKENS).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_registered_and_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoModel builds our classes when registered; else the directory's own copy, which stands alone."""
    import shutil

    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, dynamic_module_utils

    from megatron_dyt.hf import register_auto_classes
    from megatron_dyt.hf.model import MODELING_FILE

    register_auto_classes()
    register_auto_classes()
    model = small_model()
    names = {
        "AutoConfig": "modeling_llama_dyt.LlamaDyTConfig",
        "AutoModelForCausalLM": "modeling_llama_dyt.LlamaDyTForCausalLM",
    }
    model.config.auto_map = names
    model.save_pretrained(str(tmp_path / "export"))
    shutil.copy(str(modeling_llama_dyt.__file__), tmp_path / "export" / MODELING_FILE)
    assert type(AutoModelForCausalLM.from_pretrained(str(tmp_path / "export"))) is LlamaDyTForCausalLM
    assert type(AutoModel.from_pretrained(str(tmp_path / "export"))) is LlamaDyTModel

    # Registered code is preferred to the directory's.
    monkeypatch.delitem(CONFIG_MAPPING._extra_content, "llama_dyt")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    remote = AutoModelForCausalLM.from_pretrained(str(tmp_path / "export"), trust_remote_code=True).eval()
    assert type(remote).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        assert torch.equal(remote(TOKENS).logits, model(TOKENS).logits)


def test_modeling_file_stands_alone() -> None:
    tree = ast.parse(Path(str(modeling_llama_dyt.__file__)).read_text())
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add((node.module or "").split(".")[0])
    assert roots == {"collections", "inspect", "torch", "transformers", "typing"}
