"""Megatron's command line with `--normalization DyT` and the `--dyt-*` flags.

Flags default to None; `validate` turns them into resolved values (alpha as numbers), so that Megatron
saves with each checkpoint exactly what the model was built with.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any, get_args

import torch

from megatron_dyt.config import (
    QK_ALPHA,
    Backend,
    DyTConfig,
    Function,
    OnBadAlpha,
    Preset,
    Role,
    WeightInit,
    check_alpha,
    check_choice,
    parse_embedding_scale,
    resolve_embedding_scale,
)
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import handshake
from megatron_dyt.mcore.fields import DyTFields, default_init_std
from megatron_dyt.mcore.limits import refuse_unsupported
from megatron_dyt.ops.backends import choose_implementation
from megatron_dyt.parsed_args import parsed_args

NORMALIZATION = "DyT"

# Saved with a checkpoint and restored by --use-checkpoint-args: what the model's parameters depend on.
MODEL_ARGS = (
    "dyt_preset",
    *(f"dyt_alpha_init_{role}" for role in get_args(Role)),
    "dyt_bias",
    "dyt_embedding_scale",
    "dyt_function",
    "dyt_weight_init",
    "embedding_scale",
)
DYT_ARGS = (*MODEL_ARGS[:-1], "dyt_backend", "dyt_fuse_residual", "dyt_on_bad_alpha")


class _Unset(float):
    """A flag's default that can be told from the same number given by the user."""


def wrap_add_arguments(original: Callable[..., Any]) -> Callable[..., Any]:
    """`arguments.add_megatron_arguments` with DyT among the norms and a group of DyT flags."""

    @functools.wraps(original)
    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        norm = _action(parser, "normalization")
        norm.choices = [*(norm.choices or ()), NORMALIZATION]
        init_std = parser.get_default("init_method_std")
        parser.set_defaults(init_method_std=_Unset(init_std))
        add_flags(parser)
        return parser

    return add_megatron_arguments


def _action(parser: argparse.ArgumentParser, dest: str) -> argparse.Action:
    for action in parser._actions:
        if action.dest == dest:
            return action
    raise UserError(f"Megatron's parser has no --{dest}: this version is not supported by megatron_dyt.")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the plugin's flags to a parser."""
    group = parser.add_argument_group(title="dynamic tanh (megatron_dyt)")
    group.add_argument(
        "--dyt-preset",
        choices=get_args(Preset),
        help="Where alpha and the embedding scale start: 'paper' by width (arXiv 2503.10622; default), "
        "'unit' for unit variance at any width (also sets --init-method-std to "
        "1/sqrt(hidden) and --embedding-init-method-std to what --init-method-std was, unless given).",
    )
    sites = {
        "attn": "DyT in front of attention",
        "ffn": "DyT in front of the MLP or MoE",
        "final": "the final DyT",
        "qk": "DyT on queries and keys (--qk-layernorm)",
    }
    for role, where in sites.items():
        group.add_argument(
            f"--dyt-alpha-init-{role}",
            type=float,
            help=f"Initial alpha of {where}. Default: preset.",
        )
    group.add_argument(
        "--dyt-bias",
        action=argparse.BooleanOptionalAction,
        help="Give every DyT a bias (beta). Default: no, as RMSNorm and the paper's LLaMA code.",
    )
    group.add_argument(
        "--dyt-embedding-scale",
        metavar="{sqrt,unit,none,FLOAT}",
        help="Initial value of the learnable scalar on the embedding: sqrt(hidden), 1/std of the "
        "embedding, no scalar, or a number. Default: preset.",
    )
    group.add_argument(
        "--embedding-scale",
        metavar="{sqrt,unit,none,FLOAT}",
        help="The same scalar for a LayerNorm or RMSNorm model: a baseline with the same start as DyT.",
    )
    group.add_argument(
        "--dyt-function",
        choices=get_args(Function),
        help="What bounds alpha * x. Default: tanh. erf is Derf (arXiv 2512.10938).",
    )
    group.add_argument(
        "--dyt-weight-init",
        choices=get_args(WeightInit),
        help="Initial weight (gamma): one, or unit for an output of unit variance. Default: preset.",
    )
    group.add_argument("--dyt-backend", choices=get_args(Backend), help="Kernel to use. Default: auto.")
    group.add_argument(
        "--dyt-fuse-residual",
        action=argparse.BooleanOptionalAction,
        help="DyT, the residual add in front of it and the sum of their gradients in one kernel each, where "
        "the model allows it (it says so where not). Default: yes.",
    )
    group.add_argument(
        "--dyt-on-bad-alpha",
        choices=get_args(OnBadAlpha),
        help="When an update makes an alpha <= 0: stop (default), or report it and go on. One that is not "
        "finite always stops.",
    )
    group.add_argument(
        "--dyt-stats-interval",
        type=int,
        default=0,
        metavar="N",
        help="Every N steps append alpha, std of the input and saturation of each DyT to "
        "dyt_stats.jsonl in the --save directory. Default: 0, off.",
    )
    _add_load_flags(group)


def _add_load_flags(group: Any) -> None:
    """Flags of loading, for every norm."""
    group.add_argument(
        "--dyt-verify-load",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Before a checkpoint is loaded, compare what is read with the checksums in it; each rank reads "
        "a part. Default: yes, for every norm.",
    )
    group.add_argument(
        "--dyt-load-fallback",
        action="store_true",
        help="If the checkpoint to load is damaged, say so and load the complete one before it; in the "
        "--save directory the damaged one is renamed. --save-retain-interval then keeps the last two. "
        "Default: stop. For every norm.",
    )


def wrap_validate(original: Callable[..., Any]) -> Callable[..., Any]:
    """`arguments.validate_args` preceded by ours; then all ranks compare what they run."""

    @functools.wraps(original)
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        try:
            validate(args)
            result = original(args, *rest, **kwargs)
        except Exception as error:
            handshake.leave(args, error)
            raise
        handshake.compare_ranks(args)
        return result

    return validate_args


def validate(args: Any) -> None:
    """Check the plugin's flags and resolve them in place.

    Raises:
        UserError: a DyT flag without `--normalization DyT`, a bad value, or a Megatron flag that
            cannot work together with DyT.
    """
    _validate_stats(args)
    if args.normalization == NORMALIZATION:
        _resolve(args)
        refuse_unsupported(args)
    else:
        _refuse_stray_flags(args)
        _validate_scale_of_other_norm(args)
    if isinstance(args.init_method_std, _Unset):
        args.init_method_std = float(args.init_method_std)


def _validate_stats(args: Any) -> None:
    if args.dyt_stats_interval < 0:
        raise UserError(
            f"--dyt-stats-interval is {args.dyt_stats_interval}; give a number of steps, or 0 for off."
        )
    if args.dyt_stats_interval > 0 and not args.save:
        raise UserError("--dyt-stats-interval writes into the --save directory; give --save too.")


def _validate_scale_of_other_norm(args: Any) -> None:
    if args.embedding_scale is None:
        return
    args.embedding_scale = parse_embedding_scale(args.embedding_scale)
    if args.embedding_scale != "none" and getattr(args, "mtp_num_layers", None):
        raise UserError(
            "--embedding-scale cannot be combined with --mtp-num-layers: multi-token prediction has a second "
            "copy of the embedding, whose scale would go its own way. Remove one of them."
        )


def _refuse_stray_flags(args: Any) -> None:
    # What concerns the training loop alone is not among a config's fields.
    given = [name for name in DYT_ARGS if getattr(args, name, None) is not None]
    if getattr(args, "dyt_stats_interval", 0):
        given.append("dyt_stats_interval")
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        hint = ""
        if "dyt_embedding_scale" in given:
            hint = " For an embedding scale with another norm use --embedding-scale."
        raise UserError(
            f"{flags} given with --normalization {args.normalization}: DyT flags need "
            f"--normalization DyT. Add it, or take the flags away.{hint}"
        )


def _resolve(args: Any) -> None:
    """Replace the DyT flags that were not given by the preset's values."""
    config = _checked_config(args)
    if config.name == "unit" and isinstance(args.init_method_std, _Unset):
        if args.embedding_init_method_std is None:
            args.embedding_init_method_std = float(args.init_method_std)
        args.init_method_std = config.linear_init_std(args.hidden_size)
    args.dyt_preset = config.name
    for role in get_args(Role):
        setattr(args, f"dyt_alpha_init_{role}", config.alpha(role))
    args.dyt_bias = config.bias
    args.dyt_embedding_scale = args.embedding_scale = parse_embedding_scale(config.embedding_scale)
    args.dyt_function = config.function
    args.dyt_weight_init = config.weight_init
    args.dyt_backend = config.backend
    args.dyt_fuse_residual = config.fuse_residual
    args.dyt_on_bad_alpha = args.dyt_on_bad_alpha or "stop"


def _checked_config(args: Any) -> DyTConfig:
    """The DyTConfig that the flags, or the fields of the same names, ask for.

    An embedding scale that was given under the other name is copied over.
    """
    if args.embedding_scale is not None:
        if args.dyt_embedding_scale not in (None, args.embedding_scale):
            raise UserError(
                f"--embedding-scale {args.embedding_scale} and --dyt-embedding-scale "
                f"{args.dyt_embedding_scale} are the same setting; give one of them."
            )
        args.dyt_embedding_scale = args.embedding_scale
    config = config_from_args(args)
    _check_backend(config.backend)
    qk = args.dyt_alpha_init_qk
    # Restored from a checkpoint it is there, at its default, without --qk-layernorm too.
    if qk not in (None, QK_ALPHA) and not getattr(args, "qk_layernorm", False):
        raise UserError(
            f"--dyt-alpha-init-qk {qk} was given without --qk-layernorm, so there is no DyT on queries "
            "and keys. Add --qk-layernorm, or take the flag away."
        )
    return config


def _check_backend(backend: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        choose_implementation(backend, device)
    except ValueError as error:
        raise UserError(f"--dyt-backend {backend}: {error}") from error


def config_from_args(args: Any) -> DyTConfig:
    """The DyTConfig that the flags ask for; what was not given comes from the preset."""
    if args.hidden_size is None:
        raise UserError("--hidden-size is missing: alpha0 of --normalization DyT depends on it.")
    overrides = {}
    for role in get_args(Role):
        value = getattr(args, f"dyt_alpha_init_{role}")
        if value is not None:
            check_alpha(f"--dyt-alpha-init-{role}", value)
            overrides[f"alpha_{role}"] = value
    for name in ("bias", "embedding_scale", "function", "weight_init", "backend", "fuse_residual"):
        if getattr(args, f"dyt_{name}") is not None:
            overrides[name] = getattr(args, f"dyt_{name}")
    return DyTConfig.preset(args.dyt_preset or "paper", args.hidden_size, **overrides)


def wrap_load_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """`checkpointing.load_args_from_checkpoint` that restores the DyT flags as well."""

    @functools.wraps(original)
    def load_args_from_checkpoint(args: Any, *rest: Any, **kwargs: Any) -> Any:
        asked = args.normalization
        result = original(args, *rest, **kwargs)
        if isinstance(result, tuple):
            # DyT is nobody's default, so it was asked for.
            if asked == NORMALIZATION != result[0].normalization:
                raise UserError(
                    f"--normalization DyT was given, but the checkpoint holds a {result[0].normalization} "
                    "model, which --use-checkpoint-args takes over. Load a DyT checkpoint, or leave one of "
                    "the two flags out."
                )
            restore(result[0], result[1])
        return result

    return load_args_from_checkpoint


def restore(args: Any, saved: Any) -> None:
    """Copy the model's DyT flags of a checkpoint's args over; a checkpoint without them has none.

    Raises:
        UserError: a flag was given that says something else.
    """
    for name in MODEL_ARGS:
        given, kept = getattr(args, name, None), getattr(saved, name, None)
        if given is not None and _comparable(name, given) != _comparable(name, kept):
            raise UserError(
                f"--{name.replace('_', '-')} {given} was given, but the checkpoint was trained with {kept}, "
                "which --use-checkpoint-args takes over. Leave the flag out."
            )
        setattr(args, name, kept)
    if args.normalization == NORMALIZATION:
        check_choice("the checkpoint's dyt_preset", args.dyt_preset, get_args(Preset))


def _comparable(name: str, value: Any) -> Any:
    is_rule = name.endswith("embedding_scale") and value is not None
    return parse_embedding_scale(value) if is_rule else value


def wrap_post_init(original: Callable[..., None]) -> Callable[..., None]:
    """`TransformerConfig.__post_init__` that attaches `config.dyt`.

    Idempotent: Megatron Bridge calls it repeatedly.
    """

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        if self.normalization == NORMALIZATION:
            refuse_unsupported(self)
        if isinstance(self, DyTFields):
            _use_fields(self)
        original(self)
        attach(self)

    return __post_init__


def _use_fields(config: Any) -> None:
    """Set `config.dyt`, and the init stds of the preset `unit`, from the config's own fields."""
    if config.normalization != NORMALIZATION:
        _refuse_stray_flags(config)
        _validate_scale_of_other_norm(config)
        return
    config.dyt = _checked_config(config)
    std = config.dyt.linear_init_std(config.hidden_size)
    if std is not None and config.init_method_std == default_init_std(config):
        if config.embedding_init_method_std is None:
            config.embedding_init_method_std = config.init_method_std
        config.init_method_std = std


def attach(config: Any) -> None:
    """Give a DyT model's TransformerConfig its settings, unless it has them.

    They come from Megatron's command line. Users of `megatron.core`, who have none, set `config.dyt` to
    a DyTConfig before they build the model; otherwise the paper's settings for the width are taken. It is
    a plain attribute: `copy.deepcopy` keeps it, `dataclasses.replace` does not. A config with `DyTFields`
    keeps its settings through both.
    """
    if config.normalization != NORMALIZATION or getattr(config, "dyt", None) is not None:
        return
    args = parsed_args()
    by_flags = getattr(args, "normalization", None) == NORMALIZATION and hasattr(args, "dyt_preset")
    config.dyt = config_from_args(args) if by_flags else DyTConfig.paper(config.hidden_size)


def initial_embedding_scale(config: Any) -> float | None:
    """Initial value of the embedding scale for a model, or None for no scale.

    The rule is DyT's own, or for another norm `--embedding-scale` (without a command line: the plain
    attribute `config.embedding_scale`).
    """
    if config.normalization == NORMALIZATION:
        rule = config.dyt.embedding_scale
    else:
        rule = getattr(config, "embedding_scale", getattr(parsed_args(), "embedding_scale", None))
    if rule is None:
        return None
    std = (
        config.init_method_std
        if config.embedding_init_method_std is None
        else config.embedding_init_method_std
    )
    return resolve_embedding_scale(rule, config.hidden_size, std)
