"""Pretrain a LLaMA with DyT, or its RMSNorm twin, in Megatron Bridge.

    torchrun --nproc-per-node 8 examples/bridge/pretrain_llama.py --size 7b \\
        --data data/pile_text_document --tokenizer tokenizer.model --save checkpoints/7b-dyt

The model and the recipe are this project's (`megatron_dyt.recipes`), everything else is Bridge's plain GPT
recipe. It needs Megatron Bridge 0.5 or newer and GPUs. Two things differ from the paper's recipe, as Bridge
has no setting for them: weight decay leaves out alpha and gamma, and warmup is linear.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron_dyt import bridge, recipes


def config(options: argparse.Namespace) -> Any:
    """Bridge's ConfigContainer for the options."""
    from megatron.bridge.recipes.gpt import vanilla_gpt_pretrain_config

    recipe = recipes.load(options.size)
    cfg = vanilla_gpt_pretrain_config()
    cfg.model = bridge.llama_provider(options.size, **norm_of(options.norm, recipe.preset))
    cfg.model.tensor_model_parallel_size = options.tensor_parallel
    cfg.model.sequence_parallel = options.tensor_parallel > 1

    cfg.train.train_iters = recipe.train_iters
    cfg.train.global_batch_size = recipe.global_batch_size
    cfg.train.micro_batch_size = options.micro_batch_size
    cfg.optimizer.lr = recipe.lr
    cfg.optimizer.min_lr = recipe.lr * recipe.min_lr_ratio
    cfg.optimizer.adam_beta1 = recipe.adam_beta1
    cfg.optimizer.adam_beta2 = recipe.adam_beta2
    cfg.optimizer.weight_decay = recipe.weight_decay
    cfg.optimizer.clip_grad = recipe.clip_grad
    # Bridge's scheduler sets the weight decay of each step, from its own two settings.
    cfg.scheduler.start_weight_decay = cfg.scheduler.end_weight_decay = recipe.weight_decay
    cfg.scheduler.lr_warmup_iters = recipe.warmup_iters
    cfg.ddp.use_distributed_optimizer = True

    cfg.dataset.seq_length = recipe.seq_length
    cfg.dataset.blend = (options.data, None) if options.data else None  # None: mock data
    if options.tokenizer:
        cfg.tokenizer.tokenizer_type = "SentencePieceTokenizer"
        cfg.tokenizer.tokenizer_model = options.tokenizer
    else:
        cfg.tokenizer.vocab_size = recipe.vocab_size - 1  # the null tokenizer adds one
    cfg.checkpoint.save = cfg.checkpoint.load = options.save
    return cfg


def norm_of(norm: str, preset: str) -> dict[str, Any]:
    """The provider's fields for a norm; RMSNorm starts at DyT's scale, but for the preset `paper`."""
    if norm == "DyT":
        return {}
    scale = None if preset == "paper" else "unit"
    return {"normalization": norm, "dyt_preset": None, "dyt_bias": None, "embedding_scale": scale}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="7b", choices=recipes.names())
    parser.add_argument("--norm", default="DyT", choices=recipes.NORMS)
    parser.add_argument("--data", nargs="*", help="prefixes of .bin/.idx data sets; none: mock data")
    parser.add_argument("--tokenizer", help="a SentencePiece model; none: numbers as text")
    parser.add_argument("--tensor-parallel", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--save", required=True, help="folder of the checkpoints; a run goes on from there")
    return parser.parse_args(argv)


def main() -> None:
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    # Before Bridge reads a checkpoint of an earlier run.
    bridge.register()
    pretrain(config(parse()), forward_step)


if __name__ == "__main__":
    main()
