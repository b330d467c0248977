"""A dry run: `megatron-dyt dry-run --nodes 128 --gpus-per-node 8 --vocab-size 32000 -- MEGATRON FLAGS`.

Passes the flags of a launch through Megatron's own parser and validation under a simulated world of that
many ranks, and builds the model of every pipeline stage on the meta device, where tensors have shapes and
no storage. It needs neither GPUs nor the memory of the model. Reported: parameters per rank, and what those
of all ranks add up to. A flag that Megatron would refuse on the cluster is refused here.
"""

import contextlib
import io
import logging
import os
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dyt import compat
from megatron_dyt.cpu import device
from megatron_dyt.data.tokenizers import load_sentencepiece
from megatron_dyt.errors import UserError, describe
from megatron_dyt.mcore import handshake
from megatron_dyt.parsed_args import set_parsed_args
from megatron_dyt.training import flag_checks, gpu_needs, preflight, refusals

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """What a rank of a pipeline stage holds.

    Attributes:
        split: parameters of which each tensor parallel rank has a part of its own.
        replicated: parameters of which each has a copy, such as those of DyT.
        experts: parameters of which each expert parallel and each expert tensor parallel rank has its own.
        norms: DyT or RMSNorm sites.
    """

    index: int
    split: int
    replicated: int
    experts: int
    norms: int

    @property
    def parameters(self) -> int:
        return self.split + self.replicated + self.experts


def run(
    flags: Sequence[str],
    world_size: int,
    vocab_size: int,
    *,
    files: bool = False,
    parameters: int | None = None,
) -> list[str]:
    """Try the flags on a world of that many ranks; returns lines for a reader.

    Args:
        vocab_size: entries of the tokenizer.
        files: check tokenizer, data files and the checkpoint too, as training does.
        parameters: how many the whole model must have.

    Raises:
        UserError: what could not run on that cluster.
    """
    if not flags:
        raise UserError(
            "no flags to try: give Megatron's flags after `--`, as the launch script prints them."
        )
    began = time.monotonic()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    args, stages = simulate(flags, world_size, vocab_size)
    total = whole(args, stages)
    if parameters not in (None, total):
        raise UserError(
            f"the ranks' parameters add up to {total:,}, and the recipe has {parameters:,}: "
            "the flags make another model"
        )
    preflight.check_tied_prediction(args)
    if files:
        preflight.check_tokenizer(args)
        preflight.check_data(args)
        preflight.check_load(args)
    return [*report(args, stages, world_size), f"dry run: fine, in {time.monotonic() - began:.0f} s"]


def tokenizer_entries(model: str) -> int:
    """Entries of a SentencePiece file."""
    return int(load_sentencepiece(Path(model)).get_piece_size())


def simulate(flags: Sequence[str], world_size: int, vocab_size: int) -> tuple[Namespace, list[Stage]]:
    """Megatron's validated arguments and every pipeline stage, in a world that is only said to exist.

    Raises:
        UserError: flags that Megatron does not accept for this number of ranks.
    """
    import megatron_dyt

    on_gpus = torch.cuda.is_available()  # Before the CPU runtime says that there are none.
    device.activate(["--device", "cpu"])
    megatron_dyt.register()
    compat.check_training_version()
    with _environment(world_size), handshake.suspended(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = _validated(flags, vocab_size, on_gpus)
        try:
            stages = [_stage(args, index) for index in range(args.pipeline_model_parallel_size)]
        except Exception as error:
            if refusal := refusals.of(error):
                raise refusal from error
            raise
    return args, stages


@contextlib.contextmanager
def _environment(world_size: int) -> Iterator[None]:
    """What a launcher sets, as rank 0 of a world of that size sees it."""
    before = dict(os.environ)
    os.environ.update(WORLD_SIZE=str(world_size), RANK="0", LOCAL_RANK="0")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _validated(flags: Sequence[str], vocab_size: int, on_gpus: bool) -> Namespace:
    from megatron.training import arguments

    errors, report = io.StringIO(), io.StringIO()
    own, sys.argv = sys.argv, [sys.argv[0], *flags]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(report):
            args = arguments.parse_args()
            flag_checks.check(args)
            if on_gpus:
                gpu_needs.check(args)
            missing = gpu_needs.missing(args)  # The validation sets what a CPU needs.
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                arguments.validate_args(args)
    except SystemExit as refusal:
        last = (errors.getvalue().strip().splitlines() or ["no message"])[-1]
        raise UserError(f"Megatron's parser refuses the flags: {last}") from refusal
    except UserError:
        raise
    except (AssertionError, ValueError, RuntimeError) as refusal:
        raise UserError(f"Megatron refuses the flags: {describe(refusal)}") from refusal
    finally:
        sys.argv = own
    for line in missing:
        _log.info(f"not on this machine, and needed on the cluster: {line}")
    # Such as that it switches a flag off.
    for text in dict.fromkeys(" ".join(str(each.message).split()) for each in caught):
        _log.info(f"Megatron warns: {text}")
    _set_vocabulary(args, vocab_size)
    args.perform_initialization = False  # There is nothing to fill.
    set_parsed_args(args)  # Only what the model's builder reads.
    return args


def _set_vocabulary(args: Namespace, entries: int) -> None:
    """What Megatron does when it builds the tokenizer; a given size has to hold it."""
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    if getattr(args, "padded_vocab_size", None) is None:
        args.padded_vocab_size = -(-entries // multiple) * multiple
    elif args.padded_vocab_size < entries:
        raise UserError(
            f"--padded-vocab-size is {args.padded_vocab_size}, and the tokenizer has {entries} entries; "
            f"leave the flag out, or give at least {-(-entries // multiple) * multiple}"
        )


def _stage(args: Namespace, index: int) -> Stage:
    """Build the model chunks of one pipeline stage and count them."""
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.dist_utils import build_virtual_pipeline_stages
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # Ranks count tensor parallel fastest, pipeline slowest.
    rank = index * (args.world_size // args.pipeline_model_parallel_size)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=args.world_size)
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
            context_parallel_size=args.context_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,
        )
        config = gpt_config_from_args(args)
        builder = config.get_builder_cls()(config)
        with torch.device("meta"):
            chunks = build_virtual_pipeline_stages(
                builder.build_model,
                ProcessGroupCollection.use_mpu_process_groups(),
                args.virtual_pipeline_model_parallel_size,
                ModelType.encoder_or_decoder,
            )
        return _counted(index, chunks)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _counted(index: int, chunks: list[torch.nn.Module]) -> Stage:
    split = replicated = experts = 0
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        assert parameter.is_meta, "a dry run must not allocate the model"
        if not getattr(parameter, "allreduce", True):  # Megatron's mark of an expert's.
            experts += parameter.numel()
        elif getattr(parameter, "tensor_model_parallel", False):
            split += parameter.numel()
        else:
            replicated += parameter.numel()
    norms = sum("Norm" in type(module).__name__ for chunk in chunks for module in chunk.modules())
    return Stage(index, split, replicated, experts, norms)


def whole(args: Namespace, stages: list[Stage]) -> int:
    """Parameters of the model that the ranks hold together."""
    expert_ranks = args.expert_model_parallel_size * args.expert_tensor_parallel_size
    return sum(
        args.tensor_model_parallel_size * stage.split + stage.replicated + expert_ranks * stage.experts
        for stage in stages
    )


def report(args: Namespace, stages: list[Stage], world_size: int) -> list[str]:
    """Lines for a reader."""
    tp = args.tensor_model_parallel_size
    total = whole(args, stages)
    lines = [
        f"dry run: {world_size} ranks, TP {tp} x PP {len(stages)} x DP {args.data_parallel_size}; Megatron "
        "accepts the flags",
        f"  one model: {total:,} parameters ({total / 1e9:.2f}B), padded vocabulary {args.padded_vocab_size}",
    ]
    return lines + [
        f"  stage {stage.index}: {stage.parameters:,} parameters per rank ({stage.replicated:,} of them on "
        f"every tensor parallel rank), {stage.norms} norms"
        for stage in stages
    ]
