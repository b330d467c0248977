"""Megatron's command line with `--normalization DyT` and the `--dyt-*` flags.

The flags of a model default to None; `validate` turns them into resolved values (alpha as numbers), so that
Megatron saves with each checkpoint exactly what the model was built with.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import torch

from megatron_dyt import compat
from megatron_dyt.config import (
    MODEL_ARGS,
    NORMALIZATION,
    QK_ALPHA,
    SETTINGS,
    DyTConfig,
    Preset,
    Setting,
    check_choice,
    is_dyt,
    parse_embedding_scale,
    saved_running_scale,
)
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import handshake, recipe_flags, trackers
from megatron_dyt.mcore.limits import refuse_unsupported
from megatron_dyt.ops.backends import choose_implementation
from megatron_dyt.patching import wrapper

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class _Unset(float):
    """A flag's default that can be told from the same number given by the user."""


@wrapper
def wrap_add_arguments(
    original: Callable[[argparse.ArgumentParser], argparse.ArgumentParser], parser: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """`arguments.add_megatron_arguments` with DyT among the norms and the plugin's flags."""
    parser = original(parser)
    norm = _action(parser, "normalization")
    norm.choices = [*(norm.choices or ()), NORMALIZATION]
    init_std = parser.get_default("init_method_std")
    parser.set_defaults(init_method_std=_Unset(init_std))
    for title, settings in (("dynamic tanh", SETTINGS), ("any norm", recipe_flags.SETTINGS)):
        group = parser.add_argument_group(title=f"{title} (megatron_dyt)")
        for setting in settings:
            group.add_argument(setting.flag, help=setting.help, default=setting.default, **_how(setting))
    return parser


def _action(parser: argparse.ArgumentParser, dest: str) -> argparse.Action:
    for action in parser._actions:
        if action.dest == dest:
            return action
    raise UserError(f"Megatron's parser has no --{dest}: this version is not supported by megatron_dyt.")


def _how(setting: Setting) -> dict[str, Any]:
    """How argparse reads a setting's flag."""
    if setting.kind is bool:
        # One that is off can only be switched on.
        return {"action": "store_true" if setting.default is False else argparse.BooleanOptionalAction}
    if setting.choices:
        return {"choices": setting.choices}
    # What is a word or a number stays text here.
    return {"type": setting.kind if isinstance(setting.kind, type) else str, "metavar": setting.metavar}


@wrapper
def wrap_validate[R](original: Callable[..., R], args: Namespace, *rest: object, **kwargs: object) -> R:
    """`arguments.validate_args` preceded by ours; then all ranks compare what they run."""
    try:
        validate(args)
        result = original(args, *rest, **kwargs)
    except Exception as error:
        handshake.leave(args, error)
        raise
    handshake.compare_ranks(args)
    return result


def validate(args: Namespace) -> None:
    """Check the plugin's flags and resolve them in place.

    Raises:
        UserError: a DyT flag without `--normalization DyT`, a bad value, or a Megatron flag that
            cannot work together with DyT.
    """
    _validate_stats(args)
    trackers.check(args)
    _validate_fallback(args)
    recipe_flags.check(args)
    if is_dyt(args):
        _resolve(args)
        refuse_unsupported(args)
    else:
        validate_other_norm(args)
    if isinstance(args.init_method_std, _Unset):
        args.init_method_std = float(args.init_method_std)


def _validate_stats(args: Namespace) -> None:
    if args.dyt_stats_interval < 0:
        raise UserError(
            f"--dyt-stats-interval is {args.dyt_stats_interval}; give a number of steps, or 0 for off."
        )
    if args.dyt_stats_interval > 0 and not (args.save or args.metrics_dir or args.tensorboard_dir):
        raise UserError(
            "--dyt-stats-interval writes into the --save directory, without one into that of --metrics-dir, "
            "and to TensorBoard; give --save DIR, --metrics-dir DIR or --tensorboard-dir DIR too."
        )


def _validate_fallback(args: Namespace) -> None:
    interval = getattr(args, "save_retain_interval", None)
    if args.dyt_load_fallback and interval and not compat.has("deletion_by_name"):
        raise UserError(
            f"--dyt-load-fallback with --save-retain-interval {interval} needs Megatron "
            f"{compat.SINCE['deletion_by_name']} or later: {compat.megatron_version()} deletes the "
            "checkpoint before the last one, to which a damaged one falls back. Leave one of the two out."
        )


def _resolve(args: Namespace) -> None:
    """Replace the DyT flags that were not given by the preset's values."""
    config = checked_config(args)
    linear_std = config.linear_init_std(args.hidden_size)
    if linear_std is not None and isinstance(args.init_method_std, _Unset):
        if args.embedding_init_method_std is None:
            args.embedding_init_method_std = float(args.init_method_std)
        args.init_method_std = linear_std
    vars(args).update(config.to_args())
    args.dyt_on_bad_alpha = args.dyt_on_bad_alpha or "stop"


def validate_other_norm(settings: Namespace | TransformerConfig) -> None:
    """Check the settings of args, or of a config with `DyTFields`, whose norm is not DyT.

    Raises:
        UserError: a DyT setting was given, or an embedding scale that cannot be.
    """
    given = [
        setting
        for setting in SETTINGS
        if setting.needs_dyt and getattr(settings, setting.arg, None) not in (None, setting.default)
    ]
    if given:
        hint = ""
        if any(setting.field == "embedding_scale" for setting in given):
            hint = " For an embedding scale with another norm use --embedding-scale."
        raise UserError(
            f"{', '.join(setting.flag for setting in given)} given with --normalization "
            f"{settings.normalization}: DyT flags need --normalization DyT. Add it, or take the flags "
            f"away.{hint}"
        )
    if settings.embedding_scale is None:
        return
    settings.embedding_scale = parse_embedding_scale(settings.embedding_scale)
    if settings.embedding_scale != "none" and getattr(settings, "mtp_num_layers", None):
        raise UserError(
            "--embedding-scale cannot be combined with --mtp-num-layers: multi-token prediction has a second "
            "copy of the embedding, whose scale would go its own way. Remove one of them."
        )


def checked_config(settings: Namespace | TransformerConfig) -> DyTConfig:
    """The DyTConfig that args, or a config with `DyTFields`, ask for.

    Raises:
        UserError: settings that contradict each other, or cannot work on this machine.
    """
    scale, other = settings.dyt_embedding_scale, settings.embedding_scale
    if None not in (scale, other) and scale != other:
        raise UserError(
            f"--embedding-scale {other} and --dyt-embedding-scale {scale} are the same setting; give one of "
            "them."
        )
    config = DyTConfig.from_args(settings)
    _check_backend(config.backend)
    qk = settings.dyt_alpha_init_qk
    # Restored from a checkpoint it is there, at its default, without --qk-layernorm too.
    if qk not in (None, QK_ALPHA) and not getattr(settings, "qk_layernorm", False):
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


@wrapper
def wrap_load_args[R](original: Callable[..., R], args: Namespace, *rest: object, **kwargs: object) -> R:
    """`checkpointing.load_args_from_checkpoint` that restores the DyT flags as well."""
    asked_for_dyt = is_dyt(args)
    result = original(args, *rest, **kwargs)
    if isinstance(result, tuple):
        # DyT is nobody's default, so it was asked for.
        if asked_for_dyt and not is_dyt(result[0]):
            raise UserError(
                f"--normalization DyT was given, but the checkpoint holds a {result[0].normalization} "
                "model, which --use-checkpoint-args takes over. Load a DyT checkpoint, or leave one of "
                "the two flags out."
            )
        restore(result[0], result[1])
    return result


def restore(args: Namespace, saved: Namespace) -> None:
    """Copy the model's DyT flags of a checkpoint's args over; a checkpoint without them has none.

    Raises:
        UserError: a flag was given that says something else.
    """
    for name in MODEL_ARGS:
        given, kept = getattr(args, name, None), getattr(saved, name, None)
        if name == "dyt_running_scale" and is_dyt(saved):
            kept = saved_running_scale(kept)
        if given is not None and _comparable(name, given) != _comparable(name, kept):
            raise UserError(
                f"--{name.replace('_', '-')} {given} was given, but the checkpoint was trained with {kept}, "
                "which --use-checkpoint-args takes over. Leave the flag out."
            )
        setattr(args, name, kept)
    if is_dyt(args):
        check_choice("the checkpoint's dyt_preset", args.dyt_preset, get_args(Preset))


def _comparable(name: str, value: str | float | None) -> str | float | None:
    if value is None or not name.endswith("embedding_scale"):
        return value
    return parse_embedding_scale(value)
