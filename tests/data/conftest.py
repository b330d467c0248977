"""Source code as JSON lines, and a tokenizer trained on it."""

import json
from pathlib import Path

import pytest
import tokenizers as library

from megatron_dyt.data import tokenizers
from megatron_dyt.data.dataset_manifest import SENTENCEPIECE
from megatron_dyt.data.shard import Settings
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


@pytest.fixture
def settings(tokenizer_model: Path) -> Settings:
    return Settings(tokenizers.find(SENTENCEPIECE, str(tokenizer_model)))


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    """A directory with a Hugging Face tokenizer."""
    directory = tmp_path / "hf"
    directory.mkdir()
    tokenizer = library.Tokenizer(library.models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(source_texts(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    # Both ways to name a token.
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Ten shards, of about 0.05 s each."""
    directory = tmp_path / "many"
    directory.mkdir()
    for number in range(10):
        write_jsonl(directory / f"{number:02d}.jsonl", [f"{number} {text}" for text in source_texts() * 3])
    return directory
