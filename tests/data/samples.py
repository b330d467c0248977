"""Inputs that the data tests share."""

import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from megatron_dyt.cli.data import prepare_data
from megatron_dyt.data.dataset_manifest import (
    SENTENCEPIECE,
    DatasetManifest,
    Fields,
    Filters,
    MadeFromSources,
    TokenizerIdentity,
)

VOCAB_SIZE = 600


def prepare(*words: object) -> None:
    """`megatron-dyt prepare-data WORDS` in this process; errors come as they are."""
    prepare_data.main([str(word) for word in words], standalone_mode=False)


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Write one {"text": ...} a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents(prefix: Path) -> list[list[int]]:
    """The ids of each document of a dataset."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[index].tolist() for index in range(len(dataset))]


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a directory by name."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def source_texts() -> list[str]:
    """Ten modules of the standard library, which every installation has."""
    names = "argparse ast base64 bisect calendar cmd code copy csv enum"
    root = Path(sysconfig.get_path("stdlib"))
    return [(root / f"{name}.py").read_bytes().decode() for name in names.split()]


def manifest(sha256: str = "ab", bos: bool = True) -> DatasetManifest:
    """That of a dataset of one document, made with the tokenizer that has this hash."""
    tokenizer = TokenizerIdentity(SENTENCEPIECE, sha256, 1, 2)
    made_from = MadeFromSources(tokenizer, bos, True, Fields(), Filters(), ({"name": "x.jsonl"},))
    return DatasetManifest(
        *(1, 3, 10),
        dtype="uint16",
        vocab_size=VOCAB_SIZE,
        tokenizer="t.model",
        sources=["x.jsonl"],
        outputs={},
        made_from=made_from,
    )
