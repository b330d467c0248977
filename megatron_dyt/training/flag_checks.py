"""Flags that Megatron takes and that cannot work: it would say so after the model is built, or never.

They are read as parsed, before Megatron fills in what was left open; with --use-checkpoint-args the model's
come from the checkpoint, and are not looked at here.
"""

from argparse import Namespace
from collections.abc import Callable

from megatron_dyt import compat
from megatron_dyt.errors import UserError

# Megatron divides by them, or makes tensors of them.
_AT_LEAST_1 = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "seq_length"),
    *("micro_batch_size", "global_batch_size", "train_iters", "train_samples", "log_interval"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
    "expert_model_parallel_size",
)
_PROBABILITIES = ("attention_dropout", "hidden_dropout")

# What is accepted and read by nothing: name in args -> (from which feature of `compat.SINCE` on, what to do).
_IGNORED = {
    "rampup_batch_size": (
        "step_batch_size",
        "it trains with --global-batch-size from the first step. Give --step-batch-size-schedule "
        '"0:SMALL TOKENS:LARGE" without --global-batch-size',
    ),
    "apply_residual_connection_post_layernorm": ("", "the residual is added before the norm. Leave it out"),
    "enable_full_sharding_in_hsdp": (
        "",
        "what Megatron-FSDP shards over the outer ranks is --outer-dp-sharding-strategy. Give that",
    ),
    "openai_gelu": ("", "it computes the exact GELU. Leave it out"),
}


def check(args: Namespace) -> None:
    """Raise `UserError` for the first of the flags in `args`, Megatron's parsed ones, that cannot work."""
    checks: tuple[Callable[[Namespace], None], ...] = (_check_ignored, _check_numbers)
    if not getattr(args, "use_checkpoint_args", False):
        checks += (_check_attention, _check_feed_forward)
    if not getattr(args, "skip_train", False):
        checks += (_check_schedule, _check_muon)
    for each in checks:
        each(args)


def _check_ignored(args: Namespace) -> None:
    for name, (feature, advice) in _IGNORED.items():
        if getattr(args, name, None) and (not feature or compat.has(feature)):
            raise UserError(f"Megatron {compat.megatron_version()} ignores {_flag(args, name)}: {advice}")


def _check_numbers(args: Namespace) -> None:
    for name in _AT_LEAST_1:
        value = getattr(args, name, None)
        if value is not None and value < 1 and not (name == "train_iters" and args.skip_train):
            raise UserError(f"{_flag(args, name)} cannot be: give at least 1")
    for name in _PROBABILITIES:
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"{_flag(args, name)} is no probability: give a number from 0 to 1")


def _check_muon(args: Namespace) -> None:
    distributed = args.optimizer == "dist_muon" or (
        args.optimizer == "muon" and args.use_distributed_optimizer
    )
    if distributed and not args.bf16 and not args.fp16:
        raise UserError(
            "--optimizer muon with --use-distributed-optimizer fails at its first step in fp32 (Megatron "
            "wraps its optimizers for --bf16 alone). Add --bf16, or leave --use-distributed-optimizer out"
        )


def _check_attention(args: Namespace) -> None:
    if getattr(args, "multi_latent_attention", False) or args.num_attention_heads is None:
        return
    heads, groups = args.num_attention_heads, args.num_query_groups
    if args.group_query_attention and groups and heads % groups:
        fitting = [str(number) for number in range(1, heads + 1) if heads % number == 0]
        raise UserError(
            f"{_flag(args, 'num_query_groups')} does not divide {_flag(args, 'num_attention_heads')}: each "
            f"group has as many heads. Give one of {', '.join(fitting)}"
        )
    if not args.group_query_attention and groups not in (None, 1, heads):
        raise UserError(
            f"{_flag(args, 'num_query_groups')} was given without --group-query-attention: Megatron would "
            "ignore it, and give each head keys and values of its own. Add the flag, or leave both out"
        )
    if heads % args.tensor_model_parallel_size:
        raise UserError(
            f"{_flag(args, 'tensor_model_parallel_size')} does not divide "
            f"{_flag(args, 'num_attention_heads')}: each rank has as many heads"
        )
    # Rotation takes channels in pairs; a part of them (--rotary-percent) is rounded, and works.
    if args.position_embedding_type == "rope" and args.rotary_percent == 1 and (args.kv_channels or 0) % 2:
        raise UserError(
            f"{_flag(args, 'kv_channels')} is odd, and --position-embedding-type rope rotates channels in "
            "pairs: give an even number"
        )


def _check_feed_forward(args: Namespace) -> None:
    width, experts = args.ffn_hidden_size, args.num_experts
    if experts is None and width and width % args.tensor_model_parallel_size:
        raise UserError(
            f"{_flag(args, 'tensor_model_parallel_size')} does not divide {_flag(args, 'ffn_hidden_size')}: "
            "each rank has as many channels"
        )
    if experts is not None and args.moe_router_topk > experts:
        raise UserError(
            f"{_flag(args, 'moe_router_topk')} is more than {_flag(args, 'num_experts')}: a token goes to "
            "that many of them"
        )


def _check_schedule(args: Namespace) -> None:
    """The learning rate's schedule has a rate, an end, and a warm-up before it."""
    if args.lr is None:
        raise UserError("--lr RATE is missing: there is no default")
    unit = "samples" if args.train_samples is not None else "iters"
    total = getattr(args, f"train_{unit}")
    if total is None:
        raise UserError("--train-iters N is missing (or --train-samples N): how long to train")
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise UserError(f"--lr-decay-style WSD needs --lr-wsd-decay-{unit} N, the length of its last part")
    decay, given = getattr(args, f"lr_decay_{unit}"), f"lr_decay_{unit}"
    if decay is None:
        decay, given = total, f"train_{unit}"
    if decay < 1:
        raise UserError(f"{_flag(args, given)} cannot be: give at least 1")
    name = "lr_warmup_fraction" if args.lr_warmup_fraction is not None else f"lr_warmup_{unit}"
    warmup = getattr(args, name) * (decay if name == "lr_warmup_fraction" else 1)
    if warmup >= decay:
        raise UserError(
            f"{_flag(args, name)} is not shorter than the schedule, which {_flag(args, given)} ends: give a "
            "shorter warm-up"
            + ("" if given.startswith("lr") else f", or the end of the decay by --lr-decay-{unit} N")
        )


def _flag(args: Namespace, name: str) -> str:
    """ "--num-layers 2", for args.num_layers; a switch, or a list, as it is given."""
    value = getattr(args, name)
    words = value if isinstance(value, list) else [] if value is True else [value]
    return " ".join([f"--{name.replace('_', '-')}", *map(str, words)])
