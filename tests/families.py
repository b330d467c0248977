"""Small models of each of Megatron's families, and a loss of fixed data for each.

`build(name, config)` makes one of Megatron's local layers, or with `te=True` of Transformer Engine's, where
that is installed; its weights are drawn with a fixed seed. `loss_of(name, model)` is a scalar that depends on
every parameter, the same number on every tensor parallel rank. The config is one for `SIZES` (`config_for`).
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_dyt import compat
from megatron_dyt.config import DyTConfig

VOCABULARY, LENGTH, BATCH = 64, 16, 2
IMAGE, PATCH = 8, 2
# Layers of every kind that runs without CUDA kernels: attention, MLP, and MoE if the config has experts.
DENSE_PATTERN, MOE_PATTERN = "*-*-", "*-*E"

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "use_cpu_initialization": True,
}
LATENT: dict[str, Any] = {
    "add_bias_linear": False,
    "qk_layernorm": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "rope_type": "rope",
}


def config_for(family: str, normalization: str = "DyT", **overrides: Any) -> Any:
    """A TransformerConfig for a family; DyT has a bias."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    own: dict[str, Any] = {"latent": LATENT}.get(family, {})
    if family == "hybrid":
        own = {"num_layers": len(DENSE_PATTERN), "add_bias_linear": False}
    config = (MLATransformerConfig if family == "latent" else TransformerConfig)(
        **(SIZES | own | {"normalization": normalization} | overrides)
    )
    if normalization == "DyT":
        config.dyt = DyTConfig.paper(config.hidden_size, bias=True)
    return config


def build(family: str, config: Any, **stage: bool) -> Any:
    """The family's model, its weights the same at every call with the same tensor parallel size.

    stage: `pre_process` and `post_process`, of the families that know pipeline stages.
    """
    torch.manual_seed(7)
    return FAMILIES[family](config, **stage)


def gpt(config: Any, **stage: bool) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    # Without rotation a bias on the keys would change nothing, and its gradient be noise.
    return GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        **stage,
    )


def latent(config: Any, **stage: bool) -> Any:
    """GPT with latent attention of stand-ins for Transformer Engine's layers, which run without CUDA.

    Its down-projections are whole on each rank, where those of local layers are cut.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    from tests.mcore import te_stubs

    with pytest.MonkeyPatch.context() as patched:
        te_stubs.install(patched)
        return GPTModel(
            config,
            get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True, multi_latent_attention=True),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            position_embedding_type="rope",
            **stage,
        )


def t5(config: Any, te: bool = False) -> Any:
    from megatron.core.models.T5 import t5_spec
    from megatron.core.models.T5.t5_model import T5Model

    encoder, decoder = (
        getattr(t5_spec, f"get_t5_{part}_with_{'transformer_engine' if te else 'local'}_block_spec")
        for part in ("encoder", "decoder")
    )
    return T5Model(
        config,
        encoder_config=config,
        transformer_encoder_layer_spec=encoder(config.num_layers),
        transformer_decoder_layer_spec=decoder(config.num_layers),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=True,
    )


def bert(config: Any, te: bool = False, **stage: bool) -> Any:
    from megatron.core.models.bert import bert_layer_specs as specs
    from megatron.core.models.bert.bert_model import BertModel

    return BertModel(
        config,
        num_tokentypes=2,
        transformer_layer_spec=(
            specs.get_bert_layer_with_transformer_engine_spec() if te else specs.bert_layer_local_spec
        ),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=True,
        **stage,
    )


def vit(config: Any, subtype: str = "clip", te: bool = False) -> Any:
    from megatron.core.models.vision import vit_layer_specs as specs
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel

    siglip = subtype == "siglip"
    return CLIPViTModel(
        config,
        specs.get_vit_layer_with_transformer_engine_spec() if te else specs.get_vit_layer_with_local_spec(),
        add_class_token=not siglip,
        class_token_len=0 if siglip else 1,
        patch_dim=PATCH,
        img_h=IMAGE,
        img_w=IMAGE,
        model_subtype=subtype,
    )


def radio(config: Any, norm: Any = torch.nn.LayerNorm) -> Any:
    from megatron.core.models.vision.radio import RADIOViTModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec

    return RADIOViTModel(
        config,
        get_vit_layer_with_local_spec(),
        ln_pre_impl=norm,
        ln_post_impl=norm,
        patch_dim=PATCH,
        img_h=IMAGE,
        img_w=IMAGE,
        max_img_h=IMAGE,
        max_img_w=IMAGE,
        has_cpe=False,
    )


def hybrid(config: Any, te: bool = False, **stage: bool) -> Any:
    path, name = "hybrid.hybrid_model", "HybridModel"
    if compat.hybrid_stack()[1] == "MambaStack":
        path, name = "mamba.mamba_model", "MambaModel"
    model = getattr(importlib.import_module(f"megatron.core.models.{path}"), name)
    parameters = inspect.signature(model).parameters
    # 0.16 knows the second name only.
    pattern = next(each for each in ("hybrid_layer_pattern", "hybrid_override_pattern") if each in parameters)
    return model(
        config,
        megatrons_hybrid_spec() if te else hybrid_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="learned_absolute",
        **{pattern: MOE_PATTERN if config.num_moe_experts else DENSE_PATTERN},
        **stage,
    )


def megatrons_hybrid_spec() -> Any:
    """Megatron's own hybrid stack, of Transformer Engine's layers."""
    is_hybrid = compat.hybrid_stack()[1] == "HybridStack"
    name = "hybrid.hybrid_layer_specs" if is_hybrid else "mamba.mamba_layer_specs"
    specs = importlib.import_module(f"megatron.core.models.{name}")
    return specs.hybrid_stack_spec if is_hybrid else specs.mamba_stack_spec


def hybrid_spec() -> Any:
    """Megatron's hybrid stack of its local layers; Megatron itself has one of Transformer Engine's only."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    path, stack = compat.hybrid_stack()
    module = importlib.import_module(path)
    dense = get_gpt_layer_local_spec().submodules
    moe = get_gpt_layer_local_spec(num_experts=2).submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=dense.input_layernorm,
        self_attention=dense.self_attention,
        self_attn_bda=dense.self_attn_bda,
    )

    def feed_forward(parts: Any) -> Any:
        return TransformerLayerSubmodules(
            pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda
        )

    layers = {
        "attention_layer": ModuleSpec(module=TransformerLayer, submodules=attention),
        "mlp_layer": ModuleSpec(module=MLPLayer, submodules=feed_forward(dense)),
        "moe_layer": ModuleSpec(module=TransformerLayer, submodules=feed_forward(moe)),
    }
    return ModuleSpec(
        module=getattr(module, stack), submodules=getattr(module, f"{stack}Submodules")(**layers)
    )


FAMILIES: dict[str, Callable[..., Any]] = {
    "gpt": gpt,
    "latent": latent,
    "t5": t5,
    "bert": bert,
    "vit": vit,
    "radio": radio,
    "hybrid": hybrid,
}


def loss_of(family: str, model: Any) -> torch.Tensor:
    """A scalar of fixed data. Not of RADIO, whose forward needs the package einops."""
    return loss(family, forward(family, model))


def forward(family: str, model: Any) -> Any:
    """What the model makes of fixed data; on a pipeline stage that is not the last, what it hands on."""
    tokens = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) * 7 % VOCABULARY
    labels = tokens.roll(-1, 1)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    hidden = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), diagonal=1)[None, None]
    seen = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    if family == "t5":
        return model(tokens, tokens.flip(1), seen, hidden, seen, lm_labels=labels)
    if family == "bert":
        return model(tokens, torch.ones(BATCH, LENGTH), positions % 2, lm_labels=labels)
    if family in ("gpt", "latent", "hybrid"):
        return model(tokens, positions, hidden, labels=labels)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)
    return model(images, None)


def loss(family: str, output: Any) -> torch.Tensor:
    """A scalar of what the last stage of a model has made."""
    if family == "bert":
        return output[0].mean() + output[1].square().mean()
    if family in ("vit", "radio"):
        return (output * torch.linspace(-1, 1, output.shape[-1])).square().mean()
    return output.mean()
