"""Input checked before training starts, so that what is wrong is said at once and clearly.

The first rank of each node looks at the files, and rank 0 alone at checkpoints, which it may tidy; all wait
for what they find. Paths in object stores ("s3://...") are left to Megatron.
"""

import logging
import os
from argparse import Namespace
from pathlib import Path

import torch

from megatron_dyt import rendezvous
from megatron_dyt.checkpoints import iterations, optimizer_layout
from megatron_dyt.data import tokenizer_check
from megatron_dyt.data.tokenizers import load_sentencepiece
from megatron_dyt.errors import UserError
from megatron_dyt.training import data_check, flag_checks, gpu_needs

_log = logging.getLogger(__name__)


def check(args: Namespace) -> None:
    """Raise `UserError`, on every rank, when data, tokenizer, checkpoint or kernels of `args` cannot work.

    `args` are Megatron's parsed arguments, before its own validation. Leftovers of an interrupted
    save in the --save directory are removed.
    """
    if not getattr(args, "yaml_cfg", None):
        rendezvous.on_each_node("preflight", lambda: check_files(args), rendezvous.time_out(args))


def check_files(args: Namespace) -> None:
    """All checks that this rank has to make, on it alone."""
    flag_checks.check(args)
    if torch.cuda.is_available():  # Not under the CPU runtime.
        gpu_needs.check(args)
    check_tokenizer(args)
    check_data(args)
    if int(os.environ.get("RANK") or 0) == 0:
        check_evaluation(args)
        check_tied_prediction(args)
        check_save(args)
        check_load(args)


def check_tokenizer(args: Namespace) -> None:
    """The tokenizer's files exist, and a sentencepiece model can be read."""
    from megatron.core.tokenizers.utils.build_tokenizer import SP_TOKENIZERS

    if getattr(args, "use_checkpoint_args", False) and args.use_tokenizer_model_from_checkpoint_args:
        return  # Megatron takes it from the checkpoint.
    kind = args.tokenizer_type or "GPT2BPETokenizer"
    if kind == "NullTokenizer" and not getattr(args, "vocab_size", None):
        raise UserError("--tokenizer-type NullTokenizer needs --vocab-size N, the number of its ids")
    needed: dict[str, tuple[str, ...]] = {"GPT2BPETokenizer": ("vocab_file", "merge_file")}
    needed |= dict.fromkeys((*SP_TOKENIZERS, "TikTokenizer"), ("tokenizer_model",))
    for name in needed.get(kind, ()):
        flag, path = f"--{name.replace('_', '-')}", getattr(args, name)
        if path is None:
            raise UserError(f"--tokenizer-type {kind} needs {flag} FILE, which was not given")
        if "://" not in path and not os.path.isfile(path):
            raise UserError(f"{flag} {path}: no such file. Give the tokenizer's file")
    if kind in SP_TOKENIZERS and "://" not in args.tokenizer_model:
        load_sentencepiece(Path(args.tokenizer_model))


def check_data(args: Namespace) -> None:
    """Data were named; each indexed dataset's files agree, and its manifest and ids with the tokenizer."""
    from megatron.training.utils import get_blend_and_blend_per_split

    if args.mock_data:
        return
    files = (args.data_args_path, args.per_split_data_args_path, args.per_dataset_sequences_path)
    for path in filter(None, files):
        if "://" not in path and not os.path.isfile(path):
            raise UserError(f"data file list {path}: no such file")
    blend, per_split = get_blend_and_blend_per_split(args)
    blends = [each for each in (blend, *(per_split or ())) if each is not None]
    if not blends:
        raise UserError(
            "no training data were given: use --data-path PREFIX, or --train-data-path and "
            "--valid-data-path (PREFIX of PREFIX.bin and PREFIX.idx), or --mock-data for a dry run"
        )
    if args.sft:
        return
    prefixes = dict.fromkeys(prefix for prefixes, _weights in blends for prefix in prefixes)
    local = [prefix for prefix in prefixes if "://" not in prefix]
    dtypes = {prefix: data_check.check_files(prefix) for prefix in local}
    # Several data sets without weights are gone through once, which ends; so does what is read from a cache.
    if blend is not None and (len(blend[0]) == 1 or blend[1]) and not args.dataloader_fast_cache_load:
        data_check.check_split(local, args)
    tokenizer_check.check_data(local, args)
    data_check.check_ids(dtypes, args)


def check_evaluation(args: Namespace) -> None:
    """--eval-interval can be divided by, which Megatron does; see `megatron_loop.evaluation_defaults`."""
    interval = args.eval_interval
    if interval is not None and interval < 1:
        raise UserError(
            f"--eval-interval {interval} is not a number of steps: give at least 1, or leave it out to "
            "evaluate after the last step only (--eval-iters 0: never)"
        )


def check_save(args: Namespace) -> None:
    """--save can be written; what an interrupted save left there is cleared away."""
    if args.save is None or "://" in args.save:
        return
    if not args.save_interval:
        raise UserError(f"--save {args.save} needs --save-interval N, the number of steps between two saves")
    try:
        os.makedirs(args.save, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save {args.save}: cannot make this directory ({error})") from error
    if not os.access(args.save, os.W_OK | os.X_OK):
        raise UserError(f"--save {args.save}: no permission to write there")
    for line in iterations.tidy(args.save):
        _log.info(line)


def check_tied_prediction(args: Namespace) -> None:
    """A model whose last pipeline stage has a copy of a tied embedding and the output layer can be saved.

    It cannot: Megatron asserts that the output layer there has no weight, and it has one (language_module.py,
    `tie_embeddings_and_output_weights_state_dict`), so that a run ends at its first save.
    """
    layers, stages = args.mtp_num_layers, args.pipeline_model_parallel_size
    # --use-checkpoint-args says later whether they are tied.
    untied = args.untie_embeddings_and_output_weights or getattr(args, "use_checkpoint_args", False)
    if not args.save or not layers or stages == 1 or untied:
        return
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    if layout is None or "m" in str(layout).split("|")[-1]:
        raise UserError(
            f"--save with --mtp-num-layers {layers}, --pipeline-model-parallel-size {stages} and tied "
            "embeddings: Megatron cannot save a model that predicts in its last stage with the embedding's "
            "weights. Give --untie-embeddings-and-output-weights, or prediction layers a stage before the "
            "output's, such as --pipeline-model-parallel-layout 'Et|tt|tm|L'"
        )


def check_load(args: Namespace) -> None:
    """The checkpoint to load is there and whole, and its optimizer's state for this layout.

    --load of a directory without any checkpoint starts from scratch when it is also the --save
    directory (so that one command starts and resumes a run); otherwise it is an error. With
    --dyt-load-fallback a damaged one is dealt with when it is loaded.
    """
    for flag in ("load", "pretrained_checkpoint"):
        directory = getattr(args, flag, None)
        if directory is None or "://" in directory:
            continue
        step = args.ckpt_step if flag == "load" else None
        iteration = iterations.iteration_to_load(directory, step)
        if iteration is not None:
            if flag != "load" or not getattr(args, "dyt_load_fallback", False):
                iterations.check_readable(directory, iteration)
            if flag == "load":
                _check_optimizer(args, iteration)
                optimizer_layout.refuse_other(args, iterations.iteration_directory(directory, iteration))
        elif args.exit_on_missing_checkpoint or not _is_fresh_start(args, flag):
            raise UserError(
                f"--{flag.replace('_', '-')} {directory}: {iterations.missing_tracker(directory)}; to start "
                "from scratch leave the flag out, or give the same --save"
            )


def _check_optimizer(args: Namespace, iteration: str) -> None:
    """What Megatron does with the optimizer of a checkpoint that it goes on from is what the run needs."""
    if args.finetune or getattr(args, "skip_train", False):
        return
    if args.no_load_optim:
        _log.warning(
            "--no-load-optim: the learning rate's schedule begins anew at step %s, warm-up included; "
            "--lr and --lr-decay-iters are counted from there",
            iteration,
        )
    elif args.optimizer == "sgd":
        raise UserError(
            "--optimizer sgd with --load: Megatron cannot load its state (it calls a function that SGD has "
            "not). Give --no-load-optim, with which momentum and the learning rate's schedule begin anew"
        )


def _is_fresh_start(args: Namespace, flag: str) -> bool:
    """Nothing to load yet: the run will save where it loads from, or starts from another one."""
    if flag != "load":
        return False
    same = args.save is not None and os.path.abspath(args.load) == os.path.abspath(args.save)
    return same or getattr(args, "pretrained_checkpoint", None) is not None
