"""Small recordings and a small genome in the place of those that Debian's packages have."""

import gzip
import wave
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from megatron_dyt.errors import UserError

SPOKEN = 40  # recordings
BASES = 700_000


def install(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """The domains of examples/beyond_llm read them until the patch is undone."""
    from examples.beyond_llm import genome, speech

    generator = torch.Generator().manual_seed(11)
    for i in range(SPOKEN):
        record(folder / f"{i}.wav", torch.randn(12_000 + 100 * i, generator=generator))
    sequence(folder / "genome.gz", torch.randint(4, (BASES,), generator=generator))
    patch.setattr(speech, "FOLDER", folder)
    patch.setattr(genome, "PATH", folder / "genome.gz")


def record(path: Path, samples: torch.Tensor, rate: int = 8_000) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 5000).short().numpy().tobytes())


def sequence(path: Path, bases: torch.Tensor) -> None:
    """FASTA with lines of 70 bases, as the packages have it."""
    letters = "".join("ACGT"[base] for base in bases.tolist())
    lines = [letters[i : i + 70] for i in range(0, len(letters), 70)]
    path.write_bytes(gzip.compress("\n".join([">NC_0 made up, ACGT", *lines, ""]).encode(), 1))


def missing(message: str) -> NoReturn:
    raise UserError(message)
