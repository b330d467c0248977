"""A real SentencePiece tokenizer, of the project's license."""

import json
from pathlib import Path

from megatron_dyt.data import train_tokenizer

TEXT = (Path(__file__).parents[1] / "LICENSE").read_text()


def write_tokenizer_model(model: Path, vocab_size: int) -> Path:
    """`model`, a BPE model of this many pieces."""
    text = model.with_suffix(".jsonl")
    text.write_text("".join(json.dumps({"text": part}) + "\n" for part in TEXT.split("\n\n")))
    model.write_bytes(train_tokenizer.train([text], vocab_size, max_bytes=10**6))
    return model
