"""Spoken English of Debian's asterisk-core-sounds-en-wav (CC BY-SA 3.0): one speaker, 25 minutes, 8 kHz."""

import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.beyond_llm.domain import Data, Split
from megatron_dyt.errors import UserError

FOLDER = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
PACKAGE = "asterisk-core-sounds-en-wav"
RATE = 8_000  # samples per second
CLIP = 2 * RATE
VALID, TEST = 0.1, 0.15  # shares of the recordings


def read() -> Split:
    """Clips of 2 s, float32 (count, 16000), each with mean 0 and std 1; no recording is in two parts.

    Raises:
        UserError: the package is not installed, or a recording has another form than the package's.
    """
    paths = sorted(FOLDER.rglob("*.wav"))
    if not paths:
        raise UserError(
            f"no *.wav in {FOLDER}: apt-get install --no-install-recommends {PACKAGE} (Debian, Ubuntu; 24 MB)"
        )
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    valid, test = round(VALID * len(paths)), round(TEST * len(paths))
    parts = (order[valid + test :], order[:valid], order[valid : valid + test])
    return Split(*(clips([samples(paths[i]) for i in part]) for part in parts))


def samples(path: Path) -> Tensor:
    """float32 (samples,), within ±1."""
    with wave.open(str(path)) as file:
        form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
        if form != (1, 2, RATE):
            raise UserError(
                f"{path} has {form[0]} channels of {form[1]} bytes at {form[2]} Hz; read are 1 of 2 at {RATE}"
            )
        found = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return torch.from_numpy(found.astype(np.float32) / 2**15)


def clips(recordings: list[Tensor]) -> Data:
    """The recordings one after the other, cut; what is left of the last clip is dropped."""
    joined = torch.cat(recordings)
    cut = joined[: len(joined) // CLIP * CLIP].reshape(-1, CLIP)
    cut = (cut - cut.mean(1, keepdim=True)) / (cut.std(1, keepdim=True) + 1e-5)
    return Data(cut, torch.zeros(len(cut), dtype=torch.long))
