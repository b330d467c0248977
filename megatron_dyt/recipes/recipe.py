"""A recipe: one LLaMA size with everything that decides its training, and its Megatron flags.

What a recipe leaves out is where it runs: parallel layout, data, checkpoints and logging come from the
launch script and from `megatron-dyt plan`.
"""

import functools
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any

import yaml

from megatron_dyt.config import DyTConfig
from megatron_dyt.errors import UserError
from megatron_dyt.llama import NORMS, LlamaShape, as_flags


@dataclass(frozen=True, kw_only=True)
class Recipe(LlamaShape):
    """One size of `llama.yaml`: the shape, and how it is trained. Fields have the units of Megatron's flags.

    Attributes:
        vocab_size: entries of the tokenizer, before Megatron pads them to a multiple.
        seq_length: tokens of a sequence; the model has as many positions.
        global_batch_size: sequences per step.
        train_iters, warmup_iters: steps.
        lr, min_lr_ratio: peak learning rate, and the last one as a fraction of it.
        weight_decay_on: "matrices" or "all"; see `megatron_dyt.mcore.recipe_flags`.
        init_std: of the embedding, and under the preset "paper" of linear layers.
        output_init: "plain" or "depth-scaled"; see `megatron_dyt.mcore.recipe_flags`.
        preset: DyT's preset: "paper" or "auto".
        bias: whether each DyT has a bias (beta).
        paper: what the paper reports for this size (loss, zero-shot mean, GPUs); empty if it has none.
        notes: what was ambiguous, what was chosen, and the source.
    """

    name: str
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
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_per_step * self.train_iters

    @property
    def linear_init_std(self) -> float:
        """Std that linear layers start with."""
        return self.dyt.linear_init_std(self.hidden_size) or self.init_std

    @property
    def dyt(self) -> DyTConfig:
        """DyT's settings under the recipe's preset."""
        return DyTConfig.preset(self.preset, self.hidden_size, bias=self.bias)

    def flags(self, norm: str = "DyT") -> list[str]:
        """Megatron's flags for model, recipe and norm.

        Raises:
            UserError: a norm that recipes do not have.
        """
        if norm not in NORMS:
            raise UserError(f"a recipe has the norms {' and '.join(NORMS)}; {norm!r} was given.")
        return [*self.megatron_flags(), *self._training_flags(), *self._norm_flags(norm)]

    def _training_flags(self) -> list[str]:
        return as_flags(
            {
                "global_batch_size": self.global_batch_size,
                "train_iters": self.train_iters,
                "lr": self.lr,
                "min_lr": self.lr * self.min_lr_ratio,
                "lr_decay_style": "cosine",
                "lr_warmup_iters": self.warmup_iters,
                "lr_warmup_style": self.warmup_style,
                "adam_beta1": self.adam_beta1,
                "adam_beta2": self.adam_beta2,
                "weight_decay": self.weight_decay,
                "weight_decay_on": self.weight_decay_on,
                "clip_grad": self.clip_grad,
                "output_init": self.output_init,
            }
        )

    def _norm_flags(self, norm: str) -> list[str]:
        """The norm and its start. The RMSNorm twin starts at the same scale; that of a `paper` recipe is the
        paper's baseline, which has no embedding scale."""
        start = as_flags(
            {"init_method_std": self.linear_init_std, "embedding_init_method_std": self.init_std}
        )
        if norm == "RMSNorm":
            scale = ["--embedding-scale", "unit"] if self.preset != "paper" else []
            return ["--normalization", "RMSNorm", *start, *scale]
        bias = "--dyt-bias" if self.bias else "--no-dyt-bias"
        return ["--normalization", "DyT", "--dyt-preset", self.preset, bias, *start]

    def describe(self) -> list[str]:
        """Lines for a reader: size, tokens, alpha0, what the paper has, notes."""
        lines = [
            f"LLaMA {self.name}: {self.parameters_without_norms / 1e9:.3g}B parameters, "
            f"{self.tokens / 1e9:.3g}B tokens in {self.train_iters} steps",
            f"  DyT preset {self.preset}: alpha0 {self.dyt.alpha_attn:g} in front of attention, "
            f"{self.dyt.alpha_ffn:g} in front of the MLP, {self.dyt.alpha_final:g} at the end",
        ]
        if self.paper:
            known = self.paper
            lines.append(
                f"  paper, RMSNorm / DyT: loss {known['norm_loss']:.2f} / {known['dyt_loss']:.2f}, zero-shot "
                f"mean {known['norm_zero_shot']:.3f} / {known['dyt_zero_shot']:.3f}, on {known['gpus']} GPUs"
            )
        return lines + [f"  note: {note}" for note in self.notes]


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
