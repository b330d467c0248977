"""A small genome in the place of the one that Debian's package has."""

import gzip
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from megatron_dyt.errors import UserError

BASES = 700_000


def install(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """The domains of examples/beyond_llm read it until the patch is undone."""
    from examples.beyond_llm import genome

    generator = torch.Generator().manual_seed(11)
    sequence(folder / "genome.gz", torch.randint(4, (BASES,), generator=generator))
    patch.setattr(genome, "PATH", folder / "genome.gz")


def sequence(path: Path, bases: torch.Tensor) -> None:
    """FASTA with lines of 70 bases, as the packages have it."""
    letters = "".join("ACGT"[base] for base in bases.tolist())
    lines = [letters[i : i + 70] for i in range(0, len(letters), 70)]
    path.write_bytes(gzip.compress("\n".join([">NC_0 made up, ACGT", *lines, ""]).encode(), 1))


def missing(message: str) -> NoReturn:
    raise UserError(message)
