"""New tokens from a Megatron GPT model, greedily or sampled, in batches divided over ranks."""

# Dimension letters: B  prompts of a batch that are not done     V  entries of the tokenizer's vocabulary

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.batches import Item, flat_rows, plan_batches
from megatron_dyt.evaluation.forward import Forward, Positions, not_finite
from megatron_dyt.evaluation.ranks import Ranks
from megatron_dyt.log import progress_bar

# Batches of each rank between two exchanges of results: what a kill may cost. A batch is `max_new` passes.
ROUND = 4
# Of the first prompt's samples; each has a seed of its own.
SEED = 1234
_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature"}


def check_options(given: Mapping[str, Any]) -> None:
    """`UserError` for what a task's `generation_kwargs`, as lm-eval normalizes them, ask for in vain."""
    unknown = sorted(set(given) - _OPTIONS)
    if unknown:
        raise UserError(
            f"the task asks for generation options {', '.join(unknown)}, which are not supported; allowed: "
            f"{', '.join(sorted(_OPTIONS))}. Leave the task out or change its generation_kwargs"
        )
    if given.get("temperature", 0.0) < 0 or (given["do_sample"] and "temperature" not in given):
        raise UserError(
            "the task samples (do_sample) without a positive temperature; give it one in its "
            "generation_kwargs, or leave do_sample out for the likeliest tokens"
        )


class Generator:
    """Continues prompts in batches of up to `batch_tokens` tokens, padding included.

    Every process calls with the same prompts and gets all results.
    """

    def __init__(self, forward: Forward, *, batch_tokens: int, ranks: Ranks | None = None) -> None:
        self.forward = forward
        self.batch_tokens = batch_tokens
        self.ranks = ranks or Ranks()

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new: int,
        max_length: int,
        done: Callable[[list[int]], bool],
        temperature: float = 0.0,
        what: str = "generating",
        keep: Callable[[dict[int, list[int]]], object] = lambda done: None,
    ) -> list[list[int]]:
        """New tokens for every prompt, until `done(new tokens)`, or `max_new` of them, or a whole
        sequence of `max_length` (prompts are shorter).

        Greedy at temperature 0, else sampled; a prompt's random numbers depend on its place in
        `prompts` alone. There is no key-value cache: each token costs a full forward pass.
        `keep` is called after each round with what it gave, by the places in `prompts`.
        """
        self.ranks.check_same(prompts)
        lengths = [min(len(prompt) + max_new, max_length) for prompt in prompts]
        batches = plan_batches(lengths, self.batch_tokens)
        everyone: dict[int, list[int]] = {}
        mine_in_all = sum(map(len, batches[self.ranks.index :: self.ranks.count]))
        with progress_bar(what, mine_in_all, " requests") as progress:
            for start in range(0, len(batches), ROUND * self.ranks.count):
                mine: dict[int, list[int]] = {}
                together = batches[start : start + ROUND * self.ranks.count]
                for batch in together[self.ranks.index :: self.ranks.count]:
                    samplers = [torch.Generator().manual_seed(SEED + i) for i in batch]
                    rows = [list(prompts[i]) for i in batch]
                    new = self._continue(rows, samplers, max_new, max_length, done, temperature)
                    mine.update(zip(batch, new, strict=True))
                    progress.update(len(batch))
                found = self.ranks.merge(mine)
                keep(found)
                everyone |= found
        return [everyone[i] for i in range(len(prompts))]

    def _continue(
        self,
        rows: list[list[int]],
        samplers: list[torch.Generator],
        max_new: int,
        max_length: int,
        done: Callable[[list[int]], bool],
        temperature: float,
    ) -> list[list[int]]:
        """The new tokens of each of `rows`, which grow by them; a row's sampler is used for it alone."""
        starts = [len(row) for row in rows]
        live = list(range(len(rows)))
        for _ in range(max_new):
            inputs = flat_rows([Item(list(rows[i]), [0]) for i in live])
            last_B = torch.tensor([len(row) - 1 for row in inputs])
            (logits_BV,) = self.forward(inputs, Positions(torch.arange(len(live)), last_B), _itself)
            if not logits_BV.isfinite().all():
                raise not_finite()
            for row, logits_V in zip(live, logits_BV, strict=True):
                rows[row].append(_pick(logits_V, temperature, samplers[row]))
            live = [i for i in live if len(rows[i]) < max_length and not done(rows[i][starts[i] :])]
            if not live:
                break
        return [row[start:] for row, start in zip(rows, starts, strict=True)]


def _itself(logits_BV: Tensor, _where: slice) -> tuple[Tensor, ...]:
    return (logits_BV,)


def _pick(logits_V: Tensor, temperature: float, sampler: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits_V.argmax())
    chances_V = torch.softmax(logits_V / temperature, dim=0)
    return int(torch.multinomial(chances_V, 1, generator=sampler))
