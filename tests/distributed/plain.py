"""Ranks as a cluster's launcher has them (srun): each by itself, with nobody who watches them.

torchrun ends all ranks when one fails, which hides a rank that would have waited forever.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import Parent, Rank


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int
    out: str
    err: str

    @property
    def last_words(self) -> str:
        """The last line of the plugin on stderr."""
        return [line for line in self.err.splitlines() if line.startswith("megatron_dyt")][-1]


def launch(ranks: Parent, directory: Path, commands: Sequence[list[str]]) -> list[Ended]:
    """Run one Python command line per rank, and wait for all.

    Raises TimeoutError, after ending them, when they do not end by themselves.
    """
    places = [(str(directory / f"{i}.out"), str(directory / f"{i}.err")) for i in range(len(commands))]
    todo = [Rank(command, *place) for command, place in zip(commands, places, strict=True)]
    codes = ranks.run(todo, watched=False)
    texts = [[Path(file).read_text(encoding="utf-8") for file in place] for place in places]
    return [Ended(code, *text) for code, text in zip(codes, texts, strict=True)]
