"""Three settings of the paper's LLaMA recipe that Megatron has no flag for, for any norm.

- `--weight-decay-on all`: weight decay on every parameter. Megatron leaves out biases and 1-D parameters,
  and so alpha, gamma and the embedding scale; the paper's code decays them too.
- `--output-init plain`: attention's and the MLP's output layers start with the std of the others. Megatron
  divides it by sqrt(2 * layers).
- `--lr-warmup-style quadratic`: the learning rate grows with the square of the step during warmup.

The defaults are Megatron's behaviour, and nothing is touched without the flags.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from megatron_dyt.config import Setting
from megatron_dyt.parsed_args import parsed_args

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer_config import ParamKey
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
    from megatron.core.transformer.transformer_config import TransformerConfig

SETTINGS = (
    Setting(
        "weight_decay_on",
        "Parameters that weight decay applies to: matrices (Megatron's way: no biases and no 1-D "
        "parameters) or all (the paper's code).",
        Literal["matrices", "all"],
        default="matrices",
        needs_dyt=False,
    ),
    Setting(
        "output_init",
        "Initial std of the output layers of attention and MLP: depth-scaled (Megatron's way: "
        "divided by sqrt(2 * layers)) or plain, as the other layers (the paper's code).",
        Literal["depth-scaled", "plain"],
        default="depth-scaled",
        needs_dyt=False,
    ),
    Setting(
        "lr_warmup_style",
        "Form of the learning rate's warmup. Default: linear, Megatron's.",
        Literal["linear", "quadratic"],
        default="linear",
        needs_dyt=False,
    ),
)


def wrap_config_overrides(
    original: Callable[..., dict[ParamKey, ParamGroupOverride]],
) -> Callable[..., dict[ParamKey, ParamGroupOverride]]:
    """`optimizer.get_standard_config_overrides` without the groups that get no weight decay."""

    @functools.wraps(original)
    def get_standard_config_overrides(*args: object, **kwargs: object) -> dict[ParamKey, ParamGroupOverride]:
        overrides = original(*args, **kwargs)
        if getattr(parsed_args(), "weight_decay_on", None) != "all":
            return overrides
        kept = {key: dict(override) for key, override in overrides.items()}
        for override in kept.values():
            override.pop("wd_mult", None)
        return {key: override for key, override in kept.items() if override}

    return get_standard_config_overrides


def wrap_post_init(original: Callable[[TransformerConfig], None]) -> Callable[[TransformerConfig], None]:
    """`TransformerConfig.__post_init__` that keeps the output layers' std, where that is asked for."""

    @functools.wraps(original)
    def __post_init__(self: TransformerConfig) -> None:
        given = self.output_layer_init_method
        original(self)
        # One that the user's code has set stays; so does ours when Megatron calls this again.
        if given is None and getattr(parsed_args(), "output_init", None) == "plain":
            self.output_layer_init_method = self.init_method

    return __post_init__


def wrap_get_lr(original: Callable[..., float]) -> Callable[..., float]:
    """`OptimizerParamScheduler.get_lr` with the quadratic warmup."""

    @functools.wraps(original)
    def get_lr(self: OptimizerParamScheduler, param_group: dict[str, object]) -> float:
        rate = original(self, param_group)
        quadratic = getattr(parsed_args(), "lr_warmup_style", None) == "quadratic"
        if not quadratic or self.num_steps >= self.lr_warmup_steps:
            return rate
        # Megatron's is init_lr + (max_lr - init_lr) * fraction.
        fraction = self.num_steps / self.lr_warmup_steps
        return float(self.init_lr + (rate - self.init_lr) * fraction)

    return get_lr
