"""The genome of Escherichia coli 536 (NC_008253, 4.9 million bases), of Debian's package bowtie-examples.

Beside each window of it stands a decoy: bases drawn one after the other, each by the two before it, with the
frequencies of the training windows. It has the genome's composition and its triplets, not its genes. To tell
the two apart stands for the classifications of GenomicBenchmarks, which no package ships.
"""

import gzip
from pathlib import Path

import torch
from torch import Tensor

from examples.beyond_llm.domain import Data, Split
from megatron_dyt.errors import UserError

PATH = Path("/usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz")
PACKAGE = "bowtie-examples"
BASES = "ACGT"  # a base is its place here, so that its complement is 3 minus it
VALID, TEST = 128, 256  # windows; further ones are trained on


def read(length: int, train: int) -> Split:
    """Windows with their decoys, int64 (windows, 2, length); targets are not used.

    The genome is cut into as many stretches as there are windows, and a window taken from each one's start;
    a random choice of them is for validation and for test, so all parts are from all over the genome, and
    none overlap.

    Raises:
        UserError: the package is not installed, or the file has too few bases.
    """
    text = bases(PATH)
    count = train + VALID + TEST
    if len(text) < count * length:
        raise UserError(f"{PATH} has {len(text)} bases, of which {count} windows of {length} do not fit")
    windows = text[: len(text) // count * count].reshape(count, -1)[:, :length]
    generator = torch.Generator().manual_seed(0)
    windows = windows[torch.randperm(count, generator=generator)]
    parts = windows.split([train, VALID, TEST])
    chances = triplets(parts[0])
    pairs = [torch.stack([part, decoys(part, chances, generator)], 1) for part in parts]
    return Split(*(Data(pair, torch.zeros(len(pair))) for pair in pairs))


def bases(path: Path) -> Tensor:
    """The letters A, C, G and T of a FASTA file's sequences, int64; others (N: not known) are left out."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    except FileNotFoundError as error:
        raise UserError(f"no {path}: apt-get install {PACKAGE} (Debian, Ubuntu; 7 MB)") from error
    text = "".join(line for line in lines if not line.startswith(">")).upper()
    codes = torch.full((256,), -1)
    codes[torch.tensor(list(BASES.encode()))] = torch.arange(len(BASES))
    found = codes[torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()]
    return found[found >= 0]


def triplets(windows: Tensor) -> Tensor:
    """Chances (4, 4, 4) of the third base by the two before it, with one added to each count."""
    counts = torch.ones(4, 4, 4)
    places = (windows[:, :-2].flatten(), windows[:, 1:-1].flatten(), windows[:, 2:].flatten())
    counts.index_put_(places, torch.ones(()), accumulate=True)
    return counts / counts.sum(-1, keepdim=True)


def decoys(windows: Tensor, chances: Tensor, generator: torch.Generator) -> Tensor:
    """A decoy for each window, which begins with the same two bases."""
    found = [*windows[:, :2].unbind(1)]
    while len(found) < windows.shape[1]:
        drawn = torch.multinomial(chances[found[-2], found[-1]], 1, generator=generator)
        found.append(drawn[:, 0])
    return torch.stack(found, 1)
