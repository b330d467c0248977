"""A Hugging Face LLaMA becomes one with DyT. Experimental.

Alpha, weight and bias of every DyT are fitted to what the norm in its place does with a text
(`megatron_dyt.convert_norms`). The result is a LlamaDyTForCausalLM directory, to be trained on: by itself
it is worse than the model it was made of (docs/convert.md). The whole model is in memory, on the CPU.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dyt.atomic import read_text
from megatron_dyt.errors import UserError, describe
from megatron_dyt.hf import modeling_llama_dyt
from megatron_dyt.hf.directory import (
    MAX_SHARD_BYTES,
    check_free,
    check_space,
    read_config,
    whole_directory,
)
from megatron_dyt.hf.model import AUTO_MAP, MODELING_FILE
from megatron_dyt.hf.model_card import CODE_NOTE, card
from megatron_dyt.nn import ConvertedNorm, convert_norms
from megatron_dyt.version import __version__

_log = logging.getLogger(__name__)

# Names of transformers' norms in a LLaMA -> DyT's role.
ROLES = {"input_layernorm": "attn", "post_attention_layernorm": "ffn", "norm": "final"}


@dataclass(frozen=True)
class Conversion:
    """What is converted, and how.

    Attributes:
        load: directory of a LlamaForCausalLM, with its tokenizer.
        text: UTF-8 file to calibrate with, `sequences` times `length` tokens of it.
        bias: whether DyT has a bias.
        max_shard_size: bytes of a safetensors file.
    """

    load: Path
    output: Path
    text: Path
    sequences: int = 16
    length: int = 512
    bias: bool = True
    max_shard_size: int = MAX_SHARD_BYTES


def convert(job: Conversion) -> list[ConvertedNorm]:
    """Write the converted model; its directory is complete or absent. Returns what the fits came to.

    Raises:
        UserError: no LLaMA in `job.load`, no tokenizer, too little text, or no room.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    check_free("--output", job.output)
    _check_source(job.load)
    # The text before the model, which takes minutes to read.
    tokenizer = _loaded(job.load, AutoTokenizer)
    batch = _calibration_batch(job, tokenizer, _loaded(job.load, LlamaConfig))
    model = _loaded(job.load, LlamaForCausalLM, dtype="auto").eval()
    check_space("--output", job.output, sum(each.numel() * each.itemsize for each in model.parameters()))
    _log.info(f"calibrating {job.load} with {job.sequences} sequences of {job.length} tokens")
    report = convert_norms(model, {"input_ids": batch, "use_cache": False}, bias=job.bias)
    for norm in report:
        _log.info(
            f"  {norm.name}: alpha {norm.alpha:.4g}, squared error {norm.error:.2%} of the norm's output"
        )
    made = as_llama_dyt(model, report, job.bias)
    with whole_directory(job.output) as directory:
        made.save_pretrained(str(directory), max_shard_size=job.max_shard_size)
        tokenizer.save_pretrained(str(directory))
        shutil.copyfile(str(modeling_llama_dyt.__file__), directory / MODELING_FILE)
        (directory / "README.md").write_text(_card(job, report))
    _log.info(f"converted {job.load} to {job.output}; it has to be trained on (docs/convert.md)")
    return report


def _check_source(load: Path) -> None:
    config = read_config(load)
    kind = config.get("model_type")
    if kind != "llama" or config.get("quantization_config"):
        what = f"model_type {kind!r}" if kind != "llama" else "a quantized model"
        raise UserError(
            f"--load {load}: {what}; converted are LLaMAs (model_type 'llama') that are not quantized. In "
            "Python megatron_dyt.convert_norms takes other models"
        )


def _loaded(load: Path, kind: Any, **options: Any) -> Any:
    """What transformers' class `kind` makes of the directory."""
    try:
        return kind.from_pretrained(str(load), **options)
    except Exception as error:
        raise UserError(
            f"--load {load} cannot be loaded with its tokenizer ({describe(error)}). Copy it again"
        ) from error


def _calibration_batch(job: Conversion, tokenizer: Any, config: Any) -> Tensor:
    """int64 (sequences, length): the text's tokens, each sequence behind the token that begins a text."""
    if job.length > config.max_position_embeddings:
        raise UserError(
            f"--length {job.length} was given; the model has {config.max_position_embeddings} positions"
        )
    text = read_text(job.text)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    body = job.length - len(first)
    if body < 1:
        raise UserError(f"--length {job.length} has no room for text behind BOS; give at least 2")
    if len(ids) < job.sequences * body:
        raise UserError(
            f"--text {job.text} has {len(ids)} tokens; {job.sequences} sequences of {job.length} need "
            f"{job.sequences * body}. Give more text, or fewer --sequences"
        )
    rows = [first + ids[row * body : (row + 1) * body] for row in range(job.sequences)]
    return torch.tensor(rows)


def as_llama_dyt(model: Any, report: Sequence[ConvertedNorm], bias: bool) -> Any:
    """The LlamaDyTForCausalLM that has the tensors of a converted LlamaForCausalLM."""
    from megatron_dyt.hf.modeling_llama_dyt import LlamaDyTConfig, LlamaDyTForCausalLM

    settings = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        settings.pop(name, None)
    config = LlamaDyTConfig(
        **settings,
        architectures=["LlamaDyTForCausalLM"],
        dyt_bias=bias,
        dyt_alpha_init=mean_alphas(report),
        embedding_scale=None,
    )
    config.auto_map = dict(AUTO_MAP)
    with torch.device("meta"):
        made = LlamaDyTForCausalLM(config)
    made.load_state_dict(model.state_dict(), assign=True)
    made.model.rotary_emb = model.model.rotary_emb  # Its buffers are not saved, so not loaded.
    made.tie_weights()
    made.generation_config = model.generation_config
    return made.eval()


def mean_alphas(report: Sequence[ConvertedNorm]) -> dict[str, float]:
    """Geometric mean of alpha by role: where a new model of this configuration would start."""
    logs: dict[str, list[Tensor]] = {}
    for norm in report:
        role = ROLES[norm.name.rsplit(".", 1)[-1]]
        logs.setdefault(role, []).append(torch.tensor(norm.alpha).log())
    return {role: float(torch.stack(found).mean().exp()) for role, found in logs.items()}


def _card(job: Conversion, report: Sequence[ConvertedNorm]) -> str:
    errors = [norm.error for norm in report if norm.error is not None]
    text = f"""\
Made of `{job.load.name}` by megatron_dyt {__version__}: every RMSNorm became Dynamic Tanh (arXiv
2503.10622), fitted to what the norm did with {job.sequences} sequences of {job.length} tokens. Squared error
of a site, relative to its norm's output: {min(errors):.2%} to {max(errors):.2%}.

**Experimental.** It has to be trained on: by itself it is worse than the model it was made of."""
    return card("LLaMA converted to Dynamic Tanh", text, [CODE_NOTE], has_dyt=True, has_tokenizer=True)
