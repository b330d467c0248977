"""Pretrain a GPT model with Megatron's own training loop: `python -m megatron_dyt.pretrain ARGS`.

It does what Megatron-LM's `pretrain_gpt.py` does, which the megatron-core wheel lacks, with every
flag of it, plus DyT (`--normalization DyT`, `--dyt-*`) and the choice of device (`--device`).
Run it under torchrun, or alone for one process.
"""

# Dimension letters: B  sequences of a micro-batch     S  tokens of a sequence on this rank

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from megatron_dyt import compat
from megatron_dyt.cpu import device
from megatron_dyt.errors import run_main
from megatron_dyt.training import dataset_helpers, datasets, launch, megatron_loop, preflight, signals
from megatron_dyt.training.datasets import mtp_on_this_rank

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import TransformerConfig

# Megatron's start-up report counts from here.
_PROGRAM_START = time.time()

# A loss above this many times the largest one so far counts as a spike (--check-for-spiky-loss).
_SPIKE_FACTOR = 10

_BATCH_TENSORS = (
    *("tokens", "labels", "loss_mask", "position_ids", "attention_mask"),
    *("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group"),
)


def main(argv: list[str] | None = None) -> None:
    """Train as `argv` (default: the command line) says.

    Raises `UserError` for input that cannot work; see `megatron_dyt.training.preflight`.
    """
    entry = time.time()
    rest = device.activate(sys.argv[1:] if argv is None else argv)
    sys.argv = [sys.argv[0], *rest]  # Megatron parses sys.argv.
    launch.prepare_process()

    import megatron_dyt

    megatron_dyt.register()
    compat.check_training_version()
    dataset_helpers.prepare()
    _pretrain(entry)


def _pretrain(entry: float) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain, set_startup_timestamps
    from megatron.training.arguments import parse_args

    args = parse_args()
    preflight.check(args)
    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=entry)
    run, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    with launch.clean_end(), signals.writer_ignores_sigterm():
        megatron_loop.pretrain(
            run,
            datasets.build,
            ModelType.encoder_or_decoder,
            forward_step,
            {"tokenizer_type": "GPT2BPETokenizer", **megatron_loop.evaluation_defaults(args)},
            store=store,
            get_embedding_ranks=get_embedding_ranks,
        )


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    model: torch.nn.Module,
    return_schedule_plan: bool = False,
) -> tuple[Any, Callable[..., Any]]:
    """Megatron's forward step: the model's output, and the function that makes it a loss.

    The output is the loss of each token, [B, S] (on the last pipeline stage; hidden states [S, B, H]
    before it), or the schedule plan when `return_schedule_plan` is set.
    """
    from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
    from megatron.training import get_timers

    straggler = StragglerDetector()
    timer = get_timers()("batch-generator", log_level=2)
    timer.start()
    with straggler(bdata=True):
        config = get_attr_wrapped_model(model, "config")
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, config, vp_stage)
    timer.stop()

    inputs = batch["tokens"], batch["position_ids"], batch["attention_mask"]
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    with straggler:
        if return_schedule_plan:
            output = model.build_schedule_plan(*inputs, **targets)  # type: ignore[operator]
        else:
            output = model(*inputs, **targets, packed_seq_params=_packed_sequences(batch))
    return output, functools.partial(loss_func, batch["loss_mask"], model=model)


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None,
    config: TransformerConfig,
    vp_stage: int | None,
) -> dict[str, Any]:
    """This rank's part of the next micro-batch; None for every tensor it does not need.

    Tensor-parallel rank 0 reads the data and sends it to the others; each context-parallel rank
    keeps its part of the sequence. tokens, labels and position_ids are int64 [B, S], loss_mask is fp32
    [B, S], attention_mask bool [B, 1, S, S] or None.
    """
    from megatron.core import mpu
    from megatron.core import utils as core
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    args = get_args()
    packed = args.sft or getattr(args, "dataloader_inter_document_masking", False)
    has_mtp = mtp_on_this_rank(config, vp_stage)
    needs_tokens = is_first_or_last_pipeline_stage(vp_stage) or has_mtp
    nothing: dict[str, Any] = dict.fromkeys(_BATCH_TENSORS)
    if not needs_tokens and not packed:
        return nothing
    if not compat.has("model_builders"):
        return {**nothing, **megatron_loop.get_unpacked_batch(data_iterator, has_mtp)}

    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        read = next(data_iterator)
        batch = {**nothing, **{name: _to_device(read.get(name)) for name in _BATCH_TENSORS}}
    batch = core.get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=args.hybrid_context_parallel,
        **megatron_loop.place_of_batch(has_mtp),
    )
    batch = core.flatten_batch_for_packed_sequences(batch)
    if not needs_tokens:
        # A middle stage attends within documents too: it needs their bounds and nothing else.
        bounds = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
        return {**nothing, **{name: batch[name] for name in bounds}}
    return core.get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=args.hybrid_context_parallel,
        cp_group=mpu.get_context_parallel_group(),
        hybrid_cp_group_func=mpu.get_hybrid_data_context_parallel_groups,
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )


def _to_device(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cuda(non_blocking=True)


def _packed_sequences(batch: dict[str, Any]) -> PackedSeqParams | None:
    """Where the packed sequences of `batch` begin and end, for attention; None without packing."""
    if batch["cu_seqlens"] is None:
        return None
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.training import get_args
    from megatron.training.training import update_seqlen_stats_from_cu_seqlens

    real = batch["cu_seqlens"].squeeze(0)  # int32 [sequences + 1], from [1, sequences + 1].
    update_seqlen_stats_from_cu_seqlens(real)  # FLOPs are counted over real tokens.
    padded = batch["cu_seqlens_padded"]
    padded = None if padded is None else padded.squeeze(0)
    bounds = real if padded is None else padded
    longest = int(batch["max_seqlen"].item())
    cp_size = batch["local_cp_size"]
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        local_cp_size=None if cp_size is None else int(cp_size.item()),
        cp_group=batch["hybrid_cp_group"],
        tokens_per_sample=get_args().seq_length,
    )


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor, model: torch.nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the token losses that `loss_mask` keeps (fp32 scalar), their number (int32), and the report.

    `loss_mask` and `output`, the loss of each token, are [B, S], of any float type. Megatron divides the
    one by the other over all data-parallel ranks; "lm loss" of the report is both, fp32 [2].
    """
    from megatron.training import get_args

    args = get_args()
    if getattr(args, "logits_load_dir", None) is not None:
        loss, tokens, report = _distillation_loss(args)(loss_mask, output, model=model)
    else:
        mask = loss_mask.reshape(-1).float()  # [B * S]
        loss = torch.sum(output.reshape(-1).float() * mask)
        tokens = mask.sum().detach().to(torch.int)
        report = {"lm loss": torch.stack([loss.detach(), tokens.to(loss.dtype)])}
    _validate_loss(args, loss)
    return loss, tokens, report


@functools.cache
def _cached_distillation_loss(**options: Any) -> Callable[..., Any]:
    from megatron.training.distillation import LossFuncCallable

    return LossFuncCallable(**options)


def _distillation_loss(args: Any) -> Callable[..., Any]:
    """The loss against a teacher's stored log-probabilities; its reader is opened once."""
    return _cached_distillation_loss(
        logprobs_dir=args.logits_load_dir,
        decode_threads=args.logits_load_decode_threads,
        prefetch_factor=args.logits_load_prefetch_factor,
        msc_prefetch_depth=args.logits_load_msc_prefetch_depth,
        kd_loss_alpha=args.logits_load_kd_loss_alpha,
        ignore_errors=args.logits_load_ignore_errors,
    )


def _validate_loss(args: Any, loss: torch.Tensor) -> None:
    """Tell Megatron's rerun machinery about a NaN, infinite or suddenly large local loss."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine

    rerun = get_rerun_state_machine()
    checks: list[tuple[Callable[..., Any], str, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        checks.append((torch.isnan, "the loss on this rank is NaN", True))
        checks.append((torch.isinf, "the loss on this rank is infinite", True))
    if args.check_for_spiky_loss:
        spike = functools.partial(rerun.is_unexpectedly_large, threshold=_SPIKE_FACTOR, context="loss")
        checks.append((spike, "the loss on this rank is a spike", False))
    for rejected, message, fatal in checks:
        rerun.validate_result(
            result=loss, rejection_func=rejected, message=message, tolerance=0.0, fatal=fatal
        )


def get_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The ranks of one pipeline that hold the word embedding.

    The first; the last too when it shares the embedding with the output layer; and those with
    multi-token prediction layers, which embed their own input.
    """
    from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


if __name__ == "__main__":
    run_main(main)
