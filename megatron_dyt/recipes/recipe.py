"""A recipe: one LLaMA size with everything that decides its training, and its Megatron flags.

What a recipe leaves out is where it runs: parallel layout, data, checkpoints and logging come from the
launch script and from `megatron_dyt.planning`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any

import yaml

from megatron_dyt.config import DyTConfig
from megatron_dyt.errors import UserError

NORMS = ("DyT", "RMSNorm")


@dataclass(frozen=True)
class Recipe:
    """One size of `llama.yaml`; the fields have the names and units of Megatron's flags.

    Attributes:
        vocab_size: entries of the tokenizer, before Megatron pads them to a multiple.
        global_batch_size: sequences a step.
        train_iters, warmup_iters: steps.
        lr, min_lr_ratio: peak learning rate, and the last one as a fraction of it.
        weight_decay_on: "matrices" or "all"; see `megatron_dyt.mcore.recipe_flags`.
        preset: DyT's preset, "paper" or "unit".
        paper: what the paper reports for this size (loss, zero-shot mean, GPUs); empty if it has none.
        notes: what was ambiguous, what was chosen, and the source.
    """

    name: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    seq_length: int
    rope_base: int
    tie_embeddings: bool
    global_batch_size: int
    train_iters: int
    lr: float
    min_lr_ratio: float
    warmup_iters: int
    warmup_style: str
    adam_beta1: float
    adam_beta2: float
    weight_decay: float
    weight_decay_on: str
    clip_grad: float
    init_std: float
    output_init: str
    preset: str
    bias: bool
    paper: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_per_step * self.train_iters

    @property
    def parameters_without_norms(self) -> int:
        """Parameters in matrices: embedding, head, attention and SwiGLU MLPs; vocabulary unpadded."""
        kv = self.num_query_groups * self.head_dim
        attention = self.hidden_size * (2 * self.hidden_size + 2 * kv)
        mlp = 3 * self.hidden_size * self.ffn_hidden_size
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * (attention + mlp) + embeddings

    def flags(self, norm: str = "DyT") -> list[str]:
        """Megatron's flags for model, recipe and norm.

        Raises:
            UserError: a norm that recipes do not have.
        """
        if norm not in NORMS:
            raise UserError(f"a recipe has the norms {' and '.join(NORMS)}; {norm!r} was given.")
        return [*self._model_flags(), *self._training_flags(), *self._norm_flags(norm)]

    def _model_flags(self) -> list[str]:
        flags = {
            "num-layers": self.num_layers,
            "hidden-size": self.hidden_size,
            "ffn-hidden-size": self.ffn_hidden_size,
            "num-attention-heads": self.num_attention_heads,
            "seq-length": self.seq_length,
            "max-position-embeddings": self.seq_length,
            "position-embedding-type": "rope",
            "rotary-base": self.rope_base,
            "attention-dropout": 0,
            "hidden-dropout": 0,
        }
        switches = ["--swiglu", "--disable-bias-linear"]
        if not self.tie_embeddings:
            switches.append("--untie-embeddings-and-output-weights")
        if self.num_query_groups != self.num_attention_heads:
            switches += ["--group-query-attention", "--num-query-groups", str(self.num_query_groups)]
        return [*_as_flags(flags), *switches]

    def _training_flags(self) -> list[str]:
        return _as_flags(
            {
                "global-batch-size": self.global_batch_size,
                "train-iters": self.train_iters,
                "lr": self.lr,
                "min-lr": self.lr * self.min_lr_ratio,
                "lr-decay-style": "cosine",
                "lr-warmup-iters": self.warmup_iters,
                "lr-warmup-style": self.warmup_style,
                "adam-beta1": self.adam_beta1,
                "adam-beta2": self.adam_beta2,
                "weight-decay": self.weight_decay,
                "weight-decay-on": self.weight_decay_on,
                "clip-grad": self.clip_grad,
                "output-init": self.output_init,
            }
        )

    def _norm_flags(self, norm: str) -> list[str]:
        """The norm and its start. The RMSNorm twin of a `unit` recipe starts at the same scale; that of a
        `paper` recipe is the paper's baseline, which has no embedding scale."""
        unit = self.preset == "unit"
        linear_std = self.hidden_size**-0.5 if unit else self.init_std
        start = {"init-method-std": linear_std, "embedding-init-method-std": self.init_std}
        if norm == "RMSNorm":
            scale = ["--embedding-scale", "unit"] if unit else []
            return ["--normalization", "RMSNorm", *_as_flags(start), *scale]
        bias = "--dyt-bias" if self.bias else "--no-dyt-bias"
        return ["--normalization", "DyT", "--dyt-preset", self.preset, bias, *_as_flags(start)]

    def describe(self) -> list[str]:
        """Lines for a reader: size, tokens, alpha0, what the paper has, notes."""
        dyt = DyTConfig.preset(self.preset, self.hidden_size)
        lines = [
            f"LLaMA {self.name}: {self.parameters_without_norms / 1e9:.3g}B parameters, "
            f"{self.tokens / 1e9:.3g}B tokens in {self.train_iters} steps",
            f"  DyT preset {self.preset}: alpha0 {dyt.alpha_attn:g} in front of attention, "
            f"{dyt.alpha_ffn:g} elsewhere",
        ]
        if self.paper:
            known = self.paper
            lines.append(
                f"  paper, RMSNorm / DyT: loss {known['norm_loss']:.2f} / {known['dyt_loss']:.2f}, zero-shot "
                f"mean {known['norm_zero_shot']:.3f} / {known['dyt_zero_shot']:.3f}, on {known['gpus']} GPUs"
            )
        return lines + [f"  note: {note}" for note in self.notes]


def _as_flags(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        flags += [f"--{name}", f"{value:.10g}" if isinstance(value, float) else str(value)]
    return flags


@functools.cache
def _data() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("llama.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return data


def names() -> tuple[str, ...]:
    """The sizes there are recipes for, the paper's first."""
    return tuple(_data()["models"])


def load(name: str) -> Recipe:
    """The recipe called `name`, such as "7b".

    Raises:
        UserError: there is none of that name.
    """
    models = _data()["models"]
    if name not in models:
        raise UserError(f"there is no recipe {name!r}; there are {', '.join(names())}.")
    common, own = _data()["common"], models[name]
    notes = (*(common["notes"] if "paper" in own else ()), *own.get("notes", ()))
    settings = {**common, **own, "name": name, "notes": tuple(" ".join(note.split()) for note in notes)}
    unknown = settings.keys() - {each.name for each in fields(Recipe)}
    assert not unknown, f"llama.yaml has {unknown}, which no field of Recipe takes"
    return Recipe(**settings)
