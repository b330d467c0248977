"""Megatron Bridge: model providers that carry DyT's settings as fields.

    from megatron_dyt import bridge

    cfg.model = bridge.llama_provider("7b")                          # a recipe of this project
    cfg.model = bridge.with_dyt(cfg.model, dyt_preset="paper")       # the model of one of Bridge's recipes

Bridge saves a config with each checkpoint as YAML, and copies it: fields survive that, while what
`megatron_dyt.register()` attaches to a plain config does not. A process that loads such a checkpoint without
building a provider first calls `bridge.register()`.

Importing this module needs Megatron Bridge; otherwise it raises UserError.
"""

from dataclasses import dataclass
from typing import Any

import torch

import megatron_dyt
from megatron_dyt import recipes
from megatron_dyt.config import NORMALIZATION, DyTFields
from megatron_dyt.errors import UserError

try:
    from megatron.bridge.models.gpt_provider import GPTModelProvider
except ImportError as error:
    raise UserError(
        f"megatron_dyt.bridge needs Megatron Bridge, which is not installed or does not import ({error}). "
        "Install it with: pip install 'megatron-bridge[te]' (Transformer Engine needs a GPU's toolkit). "
        "Without Bridge use python -m megatron_dyt.pretrain, or megatron_dyt.config.DyTFields with "
        "megatron.core's TransformerConfig."
    ) from error

# Fields of a provider that have the name and the value of Megatron's arguments.
SHAPE_FIELDS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    *("seq_length", "position_embedding_type", "rotary_base", "add_bias_linear"),
    *("attention_dropout", "hidden_dropout"),
)


class DyTProviderMixin(DyTFields):
    """Gives a model provider of Bridge the `dyt_*` fields; list it first among the bases.

        @dataclass
        class MyProvider(DyTProviderMixin, QwenModelProvider):
            normalization: str = "DyT"

    `finalize()`, which Bridge calls after all overrides, registers the plugin and raises UserError for
    settings that cannot work.
    """

    def finalize(self) -> None:
        """Register the plugin, then Bridge's own `finalize`; calling it again is fine."""
        register()
        super().finalize()  # type: ignore[misc]  # the provider's


@dataclass
class DyTGPTModelProvider(DyTProviderMixin, GPTModelProvider):
    """Bridge's GPT provider with DyT in place of its norms."""

    normalization: str = NORMALIZATION


def register() -> None:
    """`megatron_dyt.register()`, and let Bridge read configs with the classes of this module from YAML."""
    megatron_dyt.register()
    from megatron.bridge.utils import instantiate_utils

    # Older versions of Bridge read any class.
    allow = getattr(instantiate_utils, "register_allowed_target_prefix", None)
    if allow is not None:
        allow(__name__)


def with_dyt(provider: GPTModelProvider, **settings: Any) -> DyTGPTModelProvider:
    """A copy of a `GPTModelProvider` with DyT; `settings` are fields of `DyTGPTModelProvider`.

    The copy has all else that the provider has, hooks included; the provider is left as it is.

    Raises:
        UserError: the provider is of a derived class, or a setting is not a field.
    """
    if type(provider) is not GPTModelProvider:
        name = type(provider).__name__
        raise UserError(
            f"with_dyt takes a GPTModelProvider, not a {name}. For another class write your own in a module: "
            f"@dataclass class DyT{name}(DyTProviderMixin, {name}): normalization: str = 'DyT'"
        )
    unknown = settings.keys() - DyTGPTModelProvider.__dataclass_fields__.keys()
    if unknown:
        raise UserError(f"DyTGPTModelProvider has no field {', '.join(sorted(unknown))}.")
    copy = DyTGPTModelProvider()
    copy.__dict__.update(vars(provider) | {"normalization": NORMALIZATION} | settings)
    return copy


def llama_provider(size: str, **settings: Any) -> DyTGPTModelProvider:
    """The LLaMA of a recipe (`megatron_dyt.recipes`), such as "7b"; `settings` replace its fields.

    Of the recipe's three habits that Megatron lacks, the plain init of output layers is set here; its
    weight decay and warmup are Megatron-LM flags (`megatron_dyt.mcore.recipe_flags`) that Bridge has not.

    Raises:
        UserError: there is no such recipe.
    """
    recipe = recipes.load(size)
    args = recipe.megatron_args()
    model: dict[str, Any] = {
        **{name: args[name] for name in SHAPE_FIELDS},
        "kv_channels": recipe.kv_channels,
        "vocab_size": recipe.vocab_size,
        "should_pad_vocab": True,
        "share_embeddings_and_output_weights": recipe.tie_embeddings,
        "gated_linear_unit": args["swiglu"],
        "activation_func": torch.nn.functional.silu,
        "init_method_std": recipe.linear_init_std,
        "embedding_init_method_std": recipe.init_std,
        "dyt_preset": recipe.preset,
        "dyt_bias": recipe.bias,
    }
    if recipe.output_init == "plain":
        from megatron.core.utils import init_method_normal

        model["output_layer_init_method"] = init_method_normal(recipe.linear_init_std)
    return DyTGPTModelProvider(**(model | settings))
