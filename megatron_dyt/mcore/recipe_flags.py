"""Settings that Megatron has no flag for, for any norm: three of the paper's LLaMA recipe, and two of a run.

- `--weight-decay-on all`: weight decay on every parameter. Megatron leaves out biases and 1-D parameters,
  and so alpha, gamma and the embedding scale; the paper's code decays them too.
- `--output-init plain`: attention's and the MLP's output layers start with the std of the others. Megatron
  divides it by sqrt(2 * layers).
- `--lr-warmup-style quadratic`: the learning rate grows with the square of the step during warmup.
- `--data-seed N`: the order of the data has a seed of its own. Megatron's --seed moves it together with the
  weights, so that runs cannot share the one and differ in the other.
- `--metrics-dir DIR`: where `metrics.jsonl` is written, which `metrics_writer.py` does.

The defaults are Megatron's behaviour, and nothing is touched without the flags.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, Literal

from megatron_dyt.config import Setting
from megatron_dyt.errors import UserError
from megatron_dyt.mcore.checkpoint import compare_function
from megatron_dyt.parsed_args import parsed_args
from megatron_dyt.patching import wrapper

if TYPE_CHECKING:
    from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
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
    Setting(
        "data_seed",
        "Seed of the order of the data alone; --seed is then that of the weights and of dropout. "
        "Default: --seed, as in Megatron.",
        int,
        metavar="N",
        needs_dyt=False,
    ),
    Setting(
        "metrics_dir",
        "Where metrics.jsonl is written: the logged numbers, one JSON object per line. "
        "Default: the --save directory; nowhere without one.",
        str,
        metavar="DIR",
        needs_dyt=False,
    ),
)
# Of numpy's RandomState, which Megatron's data sets shuffle with.
_LARGEST_SEED = 2**32 - 1


def check(args: Namespace) -> None:
    """Raises UserError for a seed that Megatron's data sets cannot take."""
    seed = args.data_seed
    if seed is not None and not 0 <= seed <= _LARGEST_SEED:
        raise UserError(f"--data-seed is {seed}; give a whole number from 0 to {_LARGEST_SEED}")


@wrapper
def wrap_dataset_post_init(
    original: Callable[[BlendedMegatronDatasetConfig], None], self: BlendedMegatronDatasetConfig
) -> None:
    """`BlendedMegatronDatasetConfig.__post_init__`, which every script makes its data sets with."""
    seed = getattr(parsed_args(), "data_seed", None)
    if seed is not None:
        self.random_seed = seed
    original(self)


@wrapper
def wrap_check_checkpoint_args[**P](
    original: Callable[Concatenate[Namespace, P], None],
    checkpoint_args: Namespace,
    *rest: P.args,
    **kwargs: P.kwargs,
) -> None:
    """`checkpointing.check_checkpoint_args`, by which a run goes on, for DyT's function and the data's seed.

    A run that goes on counts on the order that it has gone through so far: in another one it would meet some
    samples twice and miss others. Megatron says nothing of another --seed, and where --data-seed was never
    given, that stays.
    """
    original(checkpoint_args, *rest, **kwargs)
    args = parsed_args()
    compare_function(args, checkpoint_args, getattr(args, "load", None) or "of --load")
    if args is not None and not getattr(args, "skip_train", False):
        check_data_seed(args, checkpoint_args)


def check_data_seed(args: Namespace, saved: Namespace) -> None:
    """Raises UserError when `args` go on with other data than those of the checkpoint with `saved`."""
    now, then = getattr(args, "data_seed", None), getattr(saved, "data_seed", None)
    if now is None and then is None:
        return
    order = saved.seed if then is None else then
    if (args.seed if now is None else now) != order:
        given = f"--data-seed {now} was given" if now is not None else "--data-seed was not given"
        raise UserError(
            f"{given}, but the checkpoint was trained on data in the order of the seed {order}, and goes "
            f"on from within it. Give --data-seed {order}; to begin with new data, --finetune."
        )


@wrapper
def wrap_config_overrides(
    original: Callable[..., dict[ParamKey, ParamGroupOverride]], *args: object, **kwargs: object
) -> dict[ParamKey, ParamGroupOverride]:
    """`optimizer.get_standard_config_overrides` without the groups that get no weight decay."""
    overrides = original(*args, **kwargs)
    if getattr(parsed_args(), "weight_decay_on", None) != "all":
        return overrides
    kept = {key: dict(override) for key, override in overrides.items()}
    for override in kept.values():
        override.pop("wd_mult", None)
    return {key: override for key, override in kept.items() if override}


@wrapper
def wrap_post_init(original: Callable[[TransformerConfig], None], self: TransformerConfig) -> None:
    """`TransformerConfig.__post_init__` that keeps the output layers' std, where that is asked for."""
    given = self.output_layer_init_method
    original(self)
    # One that the user's code has set stays; so does ours when Megatron calls this again.
    if given is None and getattr(parsed_args(), "output_init", None) == "plain":
        self.output_layer_init_method = self.init_method


@wrapper
def wrap_get_lr(
    original: Callable[..., float], self: OptimizerParamScheduler, param_group: dict[str, object]
) -> float:
    """`OptimizerParamScheduler.get_lr` with the quadratic warmup."""
    rate = original(self, param_group)
    quadratic = getattr(parsed_args(), "lr_warmup_style", None) == "quadratic"
    if not quadratic or self.num_steps >= self.lr_warmup_steps:
        return rate
    # Megatron's is init_lr + (max_lr - init_lr) * fraction.
    fraction = self.num_steps / self.lr_warmup_steps
    return float(self.init_lr + (rate - self.init_lr) * fraction)
