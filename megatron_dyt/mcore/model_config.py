"""DyT's settings on Megatron's `TransformerConfig`: `config.dyt`, and what else of them a model reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_dyt.config import DEFAULT_PRESET, DyTConfig, DyTFields, is_dyt, resolve_embedding_scale
from megatron_dyt.mcore.args import checked_config, validate_other_norm
from megatron_dyt.mcore.limits import refuse_unsupported
from megatron_dyt.parsed_args import parsed_args
from megatron_dyt.patching import wrapper

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


@wrapper
def wrap_post_init(original: Callable[[TransformerConfig], None], self: TransformerConfig) -> None:
    """`TransformerConfig.__post_init__` that attaches `config.dyt`.

    Idempotent: Megatron Bridge calls it repeatedly.
    """
    if is_dyt(self):
        refuse_unsupported(self)
    if isinstance(self, DyTFields):
        _use_fields(self)
    original(self)
    attach(self)


def _use_fields(config: TransformerConfig) -> None:
    """Set `config.dyt`, and the init stds of its preset, from the config's own fields."""
    if not is_dyt(config):
        validate_other_norm(config)
        return
    config.dyt = checked_config(config)
    std = config.dyt.linear_init_std(config.hidden_size)
    default_std = float(type(config).__dataclass_fields__["init_method_std"].default)
    if std is not None and config.init_method_std == default_std:
        if config.embedding_init_method_std is None:
            config.embedding_init_method_std = config.init_method_std
        config.init_method_std = std


def attach(config: TransformerConfig) -> None:
    """Give a DyT model's TransformerConfig its settings, unless it has them.

    They come from Megatron's command line. Users of `megatron.core`, who have none, set `config.dyt` to
    a DyTConfig before they build the model; otherwise the default preset is taken, and the linear layers keep
    the init that the config has. It is
    a plain attribute: `copy.deepcopy` keeps it, `dataclasses.replace` does not. A config with `DyTFields`
    keeps its settings through both.
    """
    if not is_dyt(config) or getattr(config, "dyt", None) is not None:
        return
    args = parsed_args()
    by_flags = is_dyt(args) and hasattr(args, "dyt_preset")
    config.dyt = (
        DyTConfig.from_args(args) if by_flags else DyTConfig.preset(DEFAULT_PRESET, config.hidden_size)
    )


def initial_embedding_scale(config: TransformerConfig) -> float | None:
    """Initial value of the embedding scale for a model, or None for no scale.

    The rule is DyT's own, or for another norm `--embedding-scale` (without a command line: the plain
    attribute `config.embedding_scale`).
    """
    if is_dyt(config):
        rule = config.dyt.embedding_scale
    else:
        rule = getattr(config, "embedding_scale", getattr(parsed_args(), "embedding_scale", None))
    if rule is None:
        return None
    std = config.embedding_init_method_std
    return resolve_embedding_scale(rule, config.hidden_size, config.init_method_std if std is None else std)
