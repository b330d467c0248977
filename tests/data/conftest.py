"""Source code as JSON lines, and a tokenizer trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dyt.data.train_tokenizer import train
from tests.data.samples import VOCAB_SIZE, source_texts, write_jsonl


@pytest.fixture(scope="session")
def source_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("source") / "source.jsonl", source_texts())


@pytest.fixture(scope="session")
def tokenizer_model(source_jsonl: Path) -> Path:
    path = source_jsonl.with_name("tokenizer.model")
    path.write_bytes(train([source_jsonl], VOCAB_SIZE))
    return path
