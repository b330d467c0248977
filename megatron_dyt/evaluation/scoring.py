"""Log-probabilities and next tokens from a Megatron GPT model, in batches.

Batches are right-padded and the attention is causal, so a row's result does not depend on its
neighbours or on the padding. The output layer runs only at the positions that are asked for.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist

from megatron_dyt.data.progress import Progress

DEFAULT_BATCH_TOKENS = 8192
# The logits of one slice of positions: 2**24 fp32 numbers are 64 MiB.
LOGITS_PER_SLICE = 2**24


class Item(NamedTuple):
    """One sequence: `targets` (at least one) are the tokens after the last ones of `inputs`."""

    inputs: list[int]
    targets: list[int]


class Score(NamedTuple):
    """Sum of the targets' natural-log probabilities; whether each target is the likeliest token."""

    logprob: float
    greedy: bool


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group indices of `lengths`, longest first, so that rows times the longest <= `batch_tokens`.

    A sequence longer than `batch_tokens` gets a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class Scorer:
    """Runs `model`, a Megatron GPT model on one pipeline and tensor rank, over many sequences.

    `vocab_size` is the tokenizer's: the rows that pad the output layer take no probability.
    `group` is the data-parallel process group: batches are dealt over its ranks, every rank must
    call with the same sequences, and every rank gets all results. None means this process alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        vocab_size: int,
        device: torch.device,
        batch_tokens: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.model = model.eval()
        self.vocab_size = vocab_size
        self.device = device
        self.batch_tokens = batch_tokens
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.ranks = dist.get_world_size(group) if group is not None else 1

    def score(self, items: Sequence[Item], what: str = "scoring") -> list[Score]:
        """The `Score` of every item, in the items' order."""
        # One row an item: the log-probability, and 1 when every target is the likeliest token.
        table = torch.zeros(len(items), 2, dtype=torch.float64)
        for batch in self._my_batches([len(item.inputs) for item in items], what):
            table[batch] = self._score_batch([items[i] for i in batch])
        return [Score(logprob, greedy == 1.0) for logprob, greedy in self._sum(table).tolist()]

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new: int,
        max_length: int,
        done: Callable[[list[int]], bool],
        temperature: float = 0.0,
        seed: int = 1234,
        what: str = "generating",
    ) -> list[list[int]]:
        """New tokens for every prompt, until `done(new tokens)`, or `max_new` of them, or a whole
        sequence of `max_length` (prompts are shorter).

        Greedy at temperature 0, else sampled; a prompt's random numbers depend on `seed` and its
        place in `prompts` alone. There is no key-value cache: each token costs a full forward pass.
        """
        mine: dict[int, list[int]] = {}
        for batch in self._my_batches([min(len(p) + max_new, max_length) for p in prompts], what):
            samplers = [torch.Generator().manual_seed(seed + i) for i in batch]
            rows = [list(prompts[i]) for i in batch]
            new = self._generate_batch(rows, samplers, max_new, max_length, done, temperature)
            mine.update(zip(batch, new, strict=True))
        everyone = self._gather(mine)
        return [everyone[i] for i in range(len(prompts))]

    # --- one batch --------------------------------------------------------------------------------

    def _score_batch(self, items: list[Item]) -> torch.Tensor:
        """float64 of shape (items, 2), as `score` keeps them."""
        counts = torch.tensor([len(item.targets) for item in items])
        rows = torch.repeat_interleave(torch.arange(len(items)), counts)
        columns = torch.tensor(
            [
                len(item.inputs) - len(item.targets) + step
                for item in items
                for step in range(len(item.targets))
            ],
            dtype=torch.long,
        )
        targets = torch.tensor([token for item in items for token in item.targets])
        logprobs, greedy = self._forward(
            [item.inputs for item in items], rows, columns, _score_targets(targets)
        )
        table = torch.zeros(len(items), 2, dtype=torch.float64)
        # Summed in fp64, so that a long text's sum does not depend on the order of its parts.
        table[:, 0].index_add_(0, rows, logprobs.double())
        hits = torch.zeros(len(items), dtype=torch.float64).index_add_(0, rows, greedy.double())
        table[:, 1] = (hits == counts).double()
        return table

    def _generate_batch(
        self,
        rows: list[list[int]],
        samplers: list[torch.Generator],
        max_new: int,
        max_length: int,
        done: Callable[[list[int]], bool],
        temperature: float,
    ) -> list[list[int]]:
        starts = [len(row) for row in rows]
        live = list(range(len(rows)))
        for _ in range(max_new):
            last = torch.tensor([len(rows[i]) - 1 for i in live])
            inputs = [rows[i] for i in live]
            (logits,) = self._forward(inputs, torch.arange(len(live)), last, _itself)
            for row, row_logits in zip(live, logits, strict=True):
                rows[row].append(_pick(row_logits, temperature, samplers[row]))
            live = [i for i in live if len(rows[i]) < max_length and not done(rows[i][starts[i] :])]
            if not live:
                break
        return [row[start:] for row, start in zip(rows, starts, strict=True)]

    def _forward(
        self,
        inputs: list[list[int]],
        rows: torch.Tensor,
        columns: torch.Tensor,
        use: Callable[[torch.Tensor, slice], tuple[torch.Tensor, ...]],
    ) -> tuple[torch.Tensor, ...]:
        """`use(logits, slice)` over slices of the positions (rows, columns), joined, on the CPU.

        `logits` are fp32 of shape (positions in the slice, vocab_size).
        """
        longest = max(len(row) for row in inputs)
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in inputs])
        tokens = tokens.to(self.device)
        positions = torch.arange(longest, device=self.device).expand_as(tokens)
        rows, columns = rows.to(self.device), columns.to(self.device)

        def head(**parts: Any) -> tuple[torch.Tensor, ...]:
            hidden = parts["hidden_states"][columns, rows].unsqueeze(1)
            pieces = []
            step = max(1, LOGITS_PER_SLICE // self.vocab_size)
            for start in range(0, len(hidden), step):
                where = slice(start, start + step)
                logits, _ = parts["output_layer"](hidden[where], weight=parts["output_weight"])
                logits = parts["scale_logits"](logits)[:, 0, : self.vocab_size].float()
                pieces.append([part.cpu() for part in use(logits, where)])
            return tuple(torch.cat(column) for column in zip(*pieces, strict=True))

        with torch.no_grad():
            return self.model(tokens, positions, None, output_processor=head)

    # --- data-parallel ranks ----------------------------------------------------------------------

    def _my_batches(self, lengths: Sequence[int], what: str) -> Iterator[list[int]]:
        mine = plan_batches(lengths, self.batch_tokens)[self.rank :: self.ranks]
        # Long sequences come first: counting tokens, not sequences, makes the time left honest.
        tokens = [sum(lengths[i] for i in batch) for batch in mine]
        done = 0
        with Progress(what, sum(tokens), unit="ktok", scale=1e3, stream=self._screen()) as progress:
            for batch, amount in zip(mine, tokens, strict=True):
                yield batch
                done += amount
                progress.update(done)

    def _screen(self) -> TextIO:
        return sys.stderr if self.rank == 0 else io.StringIO()

    def _sum(self, table: torch.Tensor) -> torch.Tensor:
        """Each row was filled by one rank and is zero on the others."""
        if self.ranks == 1:
            return table
        shared = table.to(self.device)
        dist.all_reduce(shared, group=self.group)
        return shared.cpu()

    def _gather(self, mine: dict[int, list[int]]) -> dict[int, list[int]]:
        if self.ranks == 1:
            return mine
        parts: list[Any] = [None] * self.ranks
        dist.all_gather_object(parts, mine, group=self.group)
        return {index: new for part in parts for index, new in part.items()}


def _score_targets(
    targets: torch.Tensor,
) -> Callable[[torch.Tensor, slice], tuple[torch.Tensor, ...]]:
    def score(logits: torch.Tensor, where: slice) -> tuple[torch.Tensor, ...]:
        wanted = targets[where].to(logits.device)
        chosen = logits.gather(1, wanted[:, None])[:, 0]
        return chosen - logits.logsumexp(1), logits.argmax(1) == wanted

    return score


def _itself(logits: torch.Tensor, _where: slice) -> tuple[torch.Tensor, ...]:
    return (logits,)


def _pick(logits: torch.Tensor, temperature: float, sampler: torch.Generator) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    chances = torch.softmax(logits / temperature, dim=0)
    return int(torch.multinomial(chances, 1, generator=sampler))
