"""Log-probabilities from a Megatron GPT model: planned in rows, dealt over ranks, remembered on disk."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TextIO

import torch

from megatron_dyt.data.progress import Progress
from megatron_dyt.evaluation.batches import Item, Row, batches_of, flat_rows, shared_rows
from megatron_dyt.evaluation.cache import ResultCache, key_of
from megatron_dyt.evaluation.forward import Forward, not_finite
from megatron_dyt.evaluation.ranks import Ranks

DEFAULT_BATCH_TOKENS = 8192
# Batches of each rank between two exchanges of results: what a kill may cost.
ROUND = 16


class Score(NamedTuple):
    """Sum of the targets' natural-log probabilities; whether each target is the likeliest token."""

    logprob: float
    greedy: bool


class Scorer:
    """Scores sequences in batches of up to `batch_tokens` tokens, padding included.

    Every process calls with the same sequences and gets all results. With `share` (the model's hidden
    size) sequences that begin alike are computed once up to where they part; None computes each alone.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        batch_tokens: int,
        ranks: Ranks | None = None,
        share: int | None = None,
        cache: ResultCache | None = None,
    ) -> None:
        self.forward = forward
        self.batch_tokens = batch_tokens
        self.ranks = ranks or Ranks()
        self.share = share
        self.cache = cache

    def score(self, items: Sequence[Item], what: str = "scoring") -> list[Score]:
        """The `Score` of every item, in the items' order; `UserError` when one is not finite."""
        # One row an item: the log-probability, and 1 when every target is the likeliest token.
        table = torch.zeros(len(items), 2, dtype=torch.float64)
        keys = [key_of("score", *item) for item in items] if self.cache else []
        known = self._known(keys)
        for index, values in known.items():
            table[index] = torch.tensor(values, dtype=torch.float64)
        todo = [index for index in range(len(items)) if index not in known]
        rows = self._rows([items[i] for i in todo])
        for done in self._rounds(rows, [items[i] for i in todo], table, todo, what):
            if self.cache and self.ranks.reports:
                self.cache.put({keys[i]: table[i].tolist() for i in done})
        return [Score(logprob, greedy == 1.0) for logprob, greedy in table.tolist()]

    def _known(self, keys: list[str]) -> dict[int, list[float]]:
        """Results in the cache by index in `keys`, the same on every process."""
        if not self.cache:
            return {}
        found = self.ranks.from_first(self.cache.get(keys) if self.ranks.reports else {})
        known = {index: found[key] for index, key in enumerate(keys) if key in found}
        if known and self.ranks.reports:
            print(f"megatron_dyt: {len(known)} of {len(keys)} results are in the cache", file=sys.stderr)
        return known

    def _rows(self, items: Sequence[Item]) -> list[Row]:
        if self.share is None:
            return flat_rows(items)
        return shared_rows(items, self.batch_tokens, self.share)

    # --- over the ranks ---------------------------------------------------------------------------

    def _rounds(
        self, rows: list[Row], items: list[Item], table: torch.Tensor, places: list[int], what: str
    ) -> Iterator[list[int]]:
        """Fill `table` at `places` (one an item); yield, after each round, the places that are new."""
        batches = batches_of(rows, self.batch_tokens)
        total = sum(len(row) for row in rows)
        with Progress(what, total, unit="ktok", scale=1e3, stream=self._screen()) as progress:
            tokens = requests = 0
            step = ROUND * self.ranks.count
            for start in range(0, len(batches), step):
                together = batches[start : start + step]
                part = torch.zeros(len(items), 2, dtype=torch.float64)
                for number, batch in enumerate(together):
                    if number % self.ranks.count == self.ranks.index:
                        self._score_batch(batch, items, part)
                    # Of all ranks, which keep about the same pace.
                    tokens += sum(map(len, batch))
                    requests += sum(len(row.branches) for row in batch)
                    progress.update(tokens, f"{requests:,} of {len(items):,} requests")
                indices = [branch.item for batch in together for row in batch for branch in row.branches]
                new = [places[i] for i in indices]
                table[new] = self.ranks.sum(part[indices], self.forward.device)
                # Of all ranks, so that none is left waiting for one that has stopped.
                if not table[new].isfinite().all():
                    raise not_finite()
                yield new

    def _screen(self) -> TextIO:
        return sys.stderr if self.ranks.reports else io.StringIO()

    # --- one batch --------------------------------------------------------------------------------

    def _score_batch(self, batch: Sequence[Row], items: Sequence[Item], table: torch.Tensor) -> None:
        """Fill the rows of `table` (float64, one an item) of the items in `batch`."""
        branches = [(number, branch) for number, row in enumerate(batch) for branch in row.branches]
        counts = torch.tensor([len(branch.slots) for _, branch in branches])
        owners = torch.tensor([branch.item for _, branch in branches]).repeat_interleave(counts)
        rows = torch.tensor([number for number, _ in branches]).repeat_interleave(counts)
        slots = torch.tensor([slot for _, branch in branches for slot in branch.slots])
        targets = torch.tensor([token for _, branch in branches for token in items[branch.item].targets])
        # Answers that begin alike, or are one token, have positions in common: the head runs there once.
        longest = max(map(len, batch))
        places, which = torch.unique(rows * longest + slots, return_inverse=True)
        order = which.argsort()
        use = _score_targets(targets[order], which[order])
        logprobs, greedy = self.forward(batch, (places // longest, places % longest), use)
        owners = owners[order]
        # Summed in fp64, so that a long text's sum does not depend on the order of its parts.
        table[:, 0].index_add_(0, owners, logprobs.double())
        hits = torch.zeros(len(table), dtype=torch.float64).index_add_(0, owners, greedy.double())
        indices = torch.tensor([branch.item for _, branch in branches])
        table[indices, 1] = (hits[indices] == counts).double()


def _score_targets(
    targets: torch.Tensor, which: torch.Tensor
) -> Callable[[torch.Tensor, slice], tuple[torch.Tensor, ...]]:
    """Log-probability of each target, and whether it is the likeliest, at position `which` (ascending)."""

    def score(logits: torch.Tensor, where: slice) -> tuple[torch.Tensor, ...]:
        first, last = torch.searchsorted(which, torch.tensor([where.start, where.stop])).tolist()
        wanted = targets[first:last].to(logits.device)
        rows = (which[first:last] - where.start).to(logits.device)
        logprobs = logits[rows, wanted] - logits.logsumexp(1)[rows]
        return logprobs, logits.argmax(1)[rows] == wanted

    return score
