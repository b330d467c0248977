"""Whether the optimizer's state in a torch_dist checkpoint loads into this run's parallel layout.

Parameters load into any layout. The optimizer's state has limits of Megatron's. The default format of the
distributed optimizer (`dp_reshardable`) stores the buckets of its gradient buffers as they are, so that model
chunks and bucket sizes must stay; only the number of data parallel ranks may change. And with expert
parallelism the experts have an optimizer of their own, whose state one for all cannot read, nor the other way
round. Megatron finds out when models are built, with a message that names another flag, or none; the saved
arguments tell it before.
docs/checkpoints.md lists which layouts resume from which.
"""

from argparse import Namespace
from collections import Counter
from pathlib import Path

from megatron_dyt.checkpoints import iterations
from megatron_dyt.checkpoints.metadata import READ_ERRORS, read_metadata
from megatron_dyt.errors import UserError

# What Megatron saves for `--dist-ckpt-optim-fully-reshardable`, and what older versions called so.
ANY_LAYOUT = ("fully_reshardable", "fully_sharded_model_space")
# Flags, beside the sizes below, that deal layers to pipeline stages.
_PLACEMENT = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
# No optimizer's state is loaded, its format is another one, or the layout is the checkpoint's own.
_NOT_LOADED = (
    "no_load_optim",
    "finetune",
    "skip_train",
    "moe_use_upcycling",
    "freeze_all_layers",
    "use_megatron_fsdp",
    "use_mp_args_from_checkpoint_args",
)
_ANEW = "--no-load-optim loads the parameters alone, and Adam starts anew."


def refuse_other(args: Namespace, path: Path) -> None:
    """Raise `UserError` when the optimizer's state in `path` cannot be loaded into the layout of `args`.

    Args:
        args: Megatron's, of this run, validated or not.
        path: one iteration of a checkpoint, such as `.../iter_0000100`.
    """
    if any(getattr(args, flag, False) for flag in _NOT_LOADED):
        return
    saved, kind = _saved(path)
    if saved is None or getattr(saved, "no_save_optim", False):
        return
    if (
        problem := _frozen(args, saved)
        or _kinds(args, saved)
        or _experts(args, saved)
        or _buckets(args, saved, kind, path)
    ):
        raise UserError(f"the optimizer's state in {path} does not load into this layout. {problem} {_ANEW}")


def _saved(path: Path) -> tuple[Namespace | None, str | None]:
    """(arguments of the run that saved, format of its distributed optimizer); None for what is not there."""
    from megatron.core import dist_checkpointing

    try:
        if path.name == iterations.RELEASE or not dist_checkpointing.check_is_distributed_checkpoint(
            str(path)
        ):
            return None, None
        common = dist_checkpointing.load_common_state_dict(str(path))
    except READ_ERRORS:  # Damaged: that is found, and maybe passed over, when it is loaded.
        return None, None
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    return common.get("args"), metadata.get("distrib_optim_sharding_type")


def _frozen(args: Namespace, saved: Namespace) -> str | None:
    now, then = (bool(getattr(each, "dyt_freeze_alpha", None)) for each in (args, saved))
    if now == then or getattr(args, "use_checkpoint_args", False):
        return None
    if then:
        return "It was saved with --dyt-freeze-alpha, and has none for the alphas. Give the flag."
    return "It has one for the alphas, which --dyt-freeze-alpha leaves out. Leave out the flag."


def _kinds(args: Namespace, saved: Namespace) -> str | None:
    now, then = args.use_distributed_optimizer, saved.use_distributed_optimizer
    # Others are distributed by their name, and Megatron's validation then sets the flag.
    if now == then or args.optimizer not in ("adam", "sgd"):
        return None
    with_, give = ("with", "Give") if then else ("without", "Leave out")
    return f"It was saved {with_} --use-distributed-optimizer, which is another format. {give} the flag."


def _experts(args: Namespace, saved: Namespace) -> str | None:
    now, then = args.expert_model_parallel_size, saved.expert_model_parallel_size
    if (now > 1) == (then > 1):
        return None
    return (
        f"It was saved with --expert-model-parallel-size {then}, and this run has {now}: with 1 Megatron has "
        "one optimizer, with more a second one for the experts, and neither reads the other's state. Keep to "
        f"{'1' if then == 1 else 'any size above 1'}."
    )


def _buckets(args: Namespace, saved: Namespace, kind: str | None, path: Path) -> str | None:
    if not args.use_distributed_optimizer or kind is None or kind in ANY_LAYOUT:
        return None
    if args.num_layers is None:  # With --use-checkpoint-args, which brings it later.
        args = Namespace(**vars(args) | {"num_layers": saved.num_layers})
    now, then = chunks(args), chunks(saved)
    only_size = now == then
    if only_size:
        now, then = {"ddp_bucket_size": bucket_size(args)}, {"ddp_bucket_size": bucket_size(saved)}
    differing = [
        f"--{name.replace('_', '-')} {value} (saved: {then[name]})"
        for name, value in now.items()
        if value != then[name]
    ]
    if not differing:
        return None
    buffers = _buffers(path)
    # Without any the state stands parameter by parameter, as that of Megatron's layer-wise optimizers (Muon).
    if not buffers or (only_size and _one_bucket(buffers, now["ddp_bucket_size"], then["ddp_bucket_size"])):
        return None
    return (
        "The distributed optimizer's default format is for another number of data parallel ranks alone, and "
        f"this run has {', '.join(differing)}. Give the values it was saved with; to change them, go on with "
        "those until one more checkpoint is saved with --dist-ckpt-optim-fully-reshardable, which loads into "
        "any."
    )


def chunks(args: Namespace) -> dict[str, object]:
    """What decides which part of the model a rank has, by flag."""
    sizes: dict[str, object] = {
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
        "num_virtual_stages_per_pipeline_rank": _virtual_stages(args),
        "expert_model_parallel_size": args.expert_model_parallel_size,
    }
    if args.expert_model_parallel_size > 1:
        given = args.expert_tensor_parallel_size
        sizes["expert_tensor_parallel_size"] = given or args.tensor_model_parallel_size
    return sizes | {name: getattr(args, name, None) for name in _PLACEMENT}


def _virtual_stages(args: Namespace) -> int:
    per_rank, per_stage = (
        args.num_virtual_stages_per_pipeline_rank,
        args.num_layers_per_virtual_pipeline_stage,
    )
    if per_rank or not per_stage or not args.num_layers:
        return per_rank or 1
    counted = (args.account_for_embedding_in_pipeline_split, args.account_for_loss_in_pipeline_split)
    return int((args.num_layers + sum(counted)) // args.pipeline_model_parallel_size // per_stage)


def bucket_size(args: Namespace) -> int | str:
    """Parameters after which a gradient bucket ends, as Megatron decides it.

    The default grows with the data parallel ranks (`DistributedDataParallel.__init__`), from 40 of them on.
    """
    if not args.overlap_grad_reduce:
        return "infinite, without --overlap-grad-reduce"
    if getattr(args, "ddp_num_buckets", None):
        return f"of --ddp-num-buckets {args.ddp_num_buckets}"
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    return int(args.ddp_bucket_size or max(40_000_000, 1_000_000 * (args.world_size // model)))


def _one_bucket(buffers: Counter[str], *given: object) -> bool:
    """Whether no buffer is as large as the smallest bucket: then size does not matter."""
    sizes = [size for size in given if isinstance(size, int)]
    if any("num-buckets" in str(size) for size in given):
        return False
    return bool(sizes) and max(buffers.values()) < min(sizes)


def _buffers(path: Path) -> Counter[str]:
    """Parameters in each gradient buffer of a checkpoint; empty if it is damaged, as in `_saved`."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    buffers: Counter[str] = Counter()
    try:
        metadata = read_metadata(path)
    except READ_ERRORS:
        return buffers
    for key, entry in metadata.state_dict_metadata.items():
        buffer, bucket, name = key.partition(".bucket_idx_")
        if bucket and name.endswith(".param") and isinstance(entry, TensorStorageMetadata):
            buffers[buffer] += entry.size.numel()
    return buffers
