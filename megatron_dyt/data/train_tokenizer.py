"""Train a SentencePiece BPE tokenizer on what `prepare-data` reads: JSON lines, zstd, gzip, Parquet.

    megatron-dyt train-tokenizer --input t.jsonl --vocab-size 32000 --output t.model

The settings are those of LLaMA 2's tokenizer (BPE, byte fallback, single digits, identity
normalization, unk 0, bos 1, eos 2) but for one: no dummy space is put before the text, so
decode(encode(text)) == text for every text without U+2581, the character that SentencePiece writes
for a space.
"""

import io
import itertools
import logging
import re
import time
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_dyt.atomic import write_atomically
from megatron_dyt.data.dataset_manifest import Fields
from megatron_dyt.data.sources import FileSource, Item, Malformed, find
from megatron_dyt.errors import UserError

_log = logging.getLogger(__name__)

# In bytes; SentencePiece passes over longer lines without a word. Longer ones than its default of 4192 are
# common in web text.
_MAX_LINE = 1 << 20
# Enough for 32,000 pieces: four times as much changes hardly a piece, and takes four times as long.
DEFAULT_MAX_BYTES = 16_000_000
SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "add_dummy_prefix": False,
    "character_coverage": 0.99995,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "max_sentence_length": _MAX_LINE,
    # Recorded in the model file: a constant keeps the file equal on every machine.
    "num_threads": 2,
    "minloglevel": 2,
}


def sample_texts(sources: Sequence[FileSource], max_bytes: int, fields: Fields) -> Iterator[str]:
    """Yield about `max_bytes` of text in all, spread evenly over `sources`; the same on every call.

    What was taken follows the share of the files' bytes (as they are, compressed or not) that was read.
    Every document is taken when all of them fit, plain files of at most `max_bytes` surely.

    Raises:
        UserError: a source is damaged, or a record where the sample is taken is malformed.
    """
    total = sum(source.size for source in sources)
    before = taken = 0
    for source in sources:
        # A reader's position moves when it reads on from the file; in between there is a MiB of text.
        for position, group in itertools.groupby(source.read(fields), key=itemgetter(0)):
            room = max_bytes * (before + position) / total - taken
            if room <= 0:
                continue
            texts = [_text(item, source).encode() for _position, item in group]
            share = room / max(sum(map(len, texts)), 1)
            seen = used = 0
            for text in texts:
                if used <= share * seen:
                    # A character that is cut is left out.
                    yield text[: max(max_bytes - taken - used, 0)].decode(errors="ignore")
                    used += len(text)
                seen += len(text)
            taken += used
        before += source.size


def _text(item: Item, source: FileSource) -> str:
    if isinstance(item, Malformed):
        problem = f"{item.kind} ({item.detail})"
        raise UserError(
            f"{source}, {source.unit} {item.place}: {problem}; repair or remove the {source.unit}"
        )
    return item.text


def train(
    inputs: Sequence[str | Path],
    vocab_size: int,
    max_bytes: int = DEFAULT_MAX_BYTES,
    text_key: str = Fields.text,
) -> bytes:
    """Train and return the serialized SentencePiece model of exactly `vocab_size` pieces.

    `inputs` are files, directories or patterns, as `prepare-data` takes them. All of them are read; time and
    memory of the training grow with `max_bytes` (about 0.25 s a MB on 2 cores).

    Raises:
        UserError: bad input, no text, or a vocabulary that the text cannot fill or that cannot hold
            the 256 bytes, 3 special pieces and the characters of the text.
    """
    sources = find([str(each) for each in inputs])
    _log.info(
        "training a tokenizer of %d pieces on at most %.1f MB of the text in %.1f MB of files ...",
        vocab_size,
        max_bytes / 1e6,
        sum(source.size for source in sources) / 1e6,
    )
    texts = sample_texts(sources, max_bytes, Fields(text=text_key))
    # Lines, because SentencePiece never learns a piece across a newline, which is a byte piece.
    # A list, because SentencePiece hides what an iterator raises.
    lines = [piece for text in texts for line in text.split("\n") for piece in _pieces(line)]
    if not lines:
        raise UserError(f"no text in {', '.join(map(str, inputs))}; the tokenizer needs some")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            **SETTINGS,
        )
    except RuntimeError as error:
        raise _vocabulary_error(error, vocab_size) from error
    return model.getvalue()


def _pieces(line: str) -> list[str]:
    """A line cut so that SentencePiece takes all of it; none of an empty one."""
    length = _MAX_LINE // 4  # A character is four bytes at most.
    return [line[start : start + length] for start in range(0, len(line), length)]


def _vocabulary_error(error: RuntimeError, vocab_size: int) -> Exception:
    message = str(error)
    if high := re.search(r"too high.*<= (\d+)", message):
        limit = f"the text gives at most {high[1]} pieces; give more text or a smaller --vocab-size"
    elif low := re.search(r"(\d+) vs (\d+)", message):
        # SentencePiece counts the pieces that the bytes, specials and characters of the text need.
        limit = f"at least {low[2]} are needed for this text; raise --vocab-size"
    else:
        return error
    return UserError(f"--vocab-size {vocab_size} does not fit: {limit}")


def write_tokenizer(
    inputs: Sequence[str], vocab_size: int, output: Path, max_bytes: int, text_key: str
) -> None:
    """Train a tokenizer (see `train`) and write it to `output`, whole or not at all."""
    started = time.monotonic()
    if output.is_dir():
        raise UserError(f"--output {output} is a directory; give the name of a .model file in it")
    write_atomically(output, train(inputs, vocab_size, max_bytes, text_key))
    _log.info("%s: %d pieces, %.1f s", output, vocab_size, time.monotonic() - started)
