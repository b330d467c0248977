"""Log-probabilities from a Megatron GPT model: planned in rows, divided over ranks, kept on disk.

A sequence is an `Item`: inputs, and targets whose log-probabilities are summed.
"""

# Dimension letters, of names such as `logits_PV`:
#   N  items of a call                     M  items of a batch
#   T  targets of all items of a batch     P  different positions of a batch (row, slot) that predict one
#   V  entries of the tokenizer's vocabulary

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dyt.evaluation.batches import Item, Row, batches_of, flat_rows, shared_rows
from megatron_dyt.evaluation.cache import ResultCache, key_of
from megatron_dyt.evaluation.forward import Forward, Positions, UseLogits, not_finite
from megatron_dyt.evaluation.ranks import Ranks
from megatron_dyt.log import progress_bar

_log = logging.getLogger(__name__)

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
        self.ranks.check_same(items)
        # fp64 [N, 2]: the log-probability, and 1 when every target is the likeliest token.
        table_N2 = torch.zeros(len(items), 2, dtype=torch.float64)
        keys = [key_of("score", *item) for item in items] if self.cache else []
        found = self.recall(keys)
        known = {index: found[key] for index, key in enumerate(keys) if key in found}
        if known:
            _log.info(f"{len(known)} of {len(keys)} results are in the cache")
            table_N2[list(known)] = torch.tensor(list(known.values()), dtype=torch.float64)
        todo = [index for index in range(len(items)) if index not in known]
        for done, values_M2 in self._rounds([items[i] for i in todo], what):
            indices = [todo[i] for i in done]
            table_N2[indices] = values_M2
            if self.cache:
                self.keep({keys[i]: table_N2[i].tolist() for i in indices})
        return [Score(logprob, greedy == 1.0) for logprob, greedy in table_N2.tolist()]

    def recall(self, keys: list[str]) -> dict[str, Any]:
        """The results of `keys` that are in the cache, the same on every process."""
        if not self.cache:
            return {}
        found: dict[str, Any] = self.ranks.from_first(self.cache.get(keys) if self.ranks.reports else {})
        return found

    def keep(self, results: dict[str, Any]) -> None:
        """Put results, which every process has, into the cache by their keys."""
        if self.cache and self.ranks.reports:
            self.cache.put(results)

    def _rounds(self, items: Sequence[Item], what: str) -> Iterator[tuple[list[int], Tensor]]:
        """Score `items` on all ranks; after each round, the indices that are done and their fp64 [M, 2]."""
        if self.share is None:
            rows = flat_rows(items)
        else:
            rows = shared_rows(items, self.batch_tokens, self.share)
        batches = batches_of(rows, self.batch_tokens)
        requests = 0
        with progress_bar(what, sum(map(len, rows)), "tok") as progress:
            for start in range(0, len(batches), ROUND * self.ranks.count):
                together = batches[start : start + ROUND * self.ranks.count]
                part_N2 = torch.zeros(len(items), 2, dtype=torch.float64)
                for number, batch in enumerate(together):
                    if number % self.ranks.count == self.ranks.index:
                        self._score_batch(batch, items, part_N2)
                    # Of all ranks, which keep about the same pace.
                    requests += sum(len(row.branches) for row in batch)
                    progress.set_postfix_str(f"{requests:,} of {len(items):,} requests", refresh=False)
                    progress.update(sum(map(len, batch)))
                done = [branch.item for batch in together for row in batch for branch in row.branches]
                values_M2 = self.ranks.sum(part_N2[done], self.forward.device)
                # Of all ranks, so that none is left waiting for one that has stopped.
                if not values_M2.isfinite().all():
                    raise not_finite()
                yield done, values_M2

    def _score_batch(self, batch: Sequence[Row], items: Sequence[Item], table_N2: Tensor) -> None:
        """Fill the rows of `table_N2` (fp64, as in `score`) that belong to the items in `batch`."""
        branches = [(row, branch) for row, members in enumerate(batch) for branch in members.branches]
        item_M = torch.tensor([branch.item for _, branch in branches])
        row_M = torch.tensor([row for row, _ in branches])
        targets_M = torch.tensor([len(branch.slots) for _, branch in branches])
        item_T, row_T = item_M.repeat_interleave(targets_M), row_M.repeat_interleave(targets_M)
        slot_T = torch.tensor([slot for _, branch in branches for slot in branch.slots])
        target_T = torch.tensor([token for _, branch in branches for token in items[branch.item].targets])

        # Answers that begin alike, or are one token, have positions in common: the head runs there once.
        longest = max(map(len, batch))
        place_P, which_T = torch.unique(row_T * longest + slot_T, return_inverse=True)
        order_T = which_T.argsort()
        where = Positions(place_P // longest, place_P % longest)
        logprob_T, hit_T = self.forward(batch, where, _score_targets(target_T[order_T], which_T[order_T]))

        item_T = item_T[order_T]
        # Summed in fp64, so that a long text's sum does not depend on the order of its parts.
        table_N2[:, 0].index_add_(0, item_T, logprob_T.double())
        hits_N = torch.zeros(len(table_N2), dtype=torch.float64).index_add_(0, item_T, hit_T.double())
        table_N2[item_M, 1] = (hits_N[item_M] == targets_M).double()


def _score_targets(target_T: Tensor, which_T: Tensor) -> UseLogits:
    """fp32 log-probability of each target, and bool whether it is the likeliest token, both [T].

    `which_T` are the indices of the targets' positions, ascending, so that each slice of positions has
    a slice of targets.
    """

    def score(logits_PV: Tensor, where: slice) -> tuple[Tensor, ...]:
        first, last = torch.searchsorted(which_T, torch.tensor([where.start, where.stop])).tolist()
        wanted_T = target_T[first:last].to(logits_PV.device)
        row_T = (which_T[first:last] - where.start).to(logits_PV.device)
        logprob_T = logits_PV[row_T, wanted_T] - logits_PV.logsumexp(1)[row_T]
        return logprob_T, logits_PV.argmax(1)[row_T] == wanted_T

    return score
