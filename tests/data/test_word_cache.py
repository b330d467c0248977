"""The word cache gives SentencePiece's ids, on every text and for every model that it accepts."""

import io
import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from megatron_dyt.data import train_tokenizer, word_cache
from megatron_dyt.data.word_cache import WordCache, obstacle
from tests.data.samples import source_texts

SCRIPTS = [
    "漢字かな交じり文、テスト。 日本語",
    "русский текст и ещё слова",
    "naïve café “quotes” … ½ £5",
    "العربية نص",
    "🙂👩‍🚀 emoji",
    "a  b   c    d     e",
]
# What could be cut, joined or counted wrongly.
AWKWARD = [
    *(" ", "  ", " " * 40, "\n", "\r\n", "\n\n", "\t", "▁", "▁▁", "\0", "\x01", "\x7f", "\x85"),
    *(
        "\u2028",
        "\ufeff",
        "\u00a0",
        "\u3000",
        "e\u0301",
        "\U0010ffff",
        "\ud7ff",
        "\ue000",
        "\ufffd",
        "\ufffe",
    ),
    *("<s>", "</s>", "<unk>", "<0x0A>", "\\n", "x" * 40, "=" * 33, "0", "1234", "_", "();", "'s"),
    *("the", "ing", "def ", "return", "self.", "import", "漢字", "か", "русск", "é", "🙂", "“", "a", "Z"),
]
# LLaMA 2's model has the dummy prefix; pieces over several words or scripts make long, rare words.
VARIANTS: dict[str, dict[str, Any]] = {
    "as trained here": {},
    "as LLaMA's": {"add_dummy_prefix": True},
    "pieces over words": {"split_by_whitespace": False},
    "pieces over scripts": {
        "split_by_unicode_script": False,
        "split_by_number": False,
        "split_digits": False,
    },
    "no pieces of spaces": {"allow_whitespace_only_pieces": False, "add_dummy_prefix": True},
}


@pytest.fixture(scope="module")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    lines = [line for text in source_texts()[:4] for line in text.split("\n") if line] + SCRIPTS * 40
    made: dict[str, Path] = {}

    def make(name: str, **changes: Any) -> Path:
        if name not in made:
            file = io.BytesIO()
            settings = train_tokenizer.SETTINGS | {"vocab_size": 1500} | changes
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=file, **settings
            )
            made[name] = tmp_path_factory.mktemp("model") / "t.model"
            made[name].write_bytes(file.getvalue())
        return made[name]

    return make


def random_text(rng: random.Random, lines: list[str]) -> str:
    size = rng.choice([0, 1, 2, 3, 10, 60])
    match rng.choice(["awkward", "awkward", "unicode", "lines"]):
        case "awkward":
            return "".join(rng.choices(AWKWARD, k=size))
        case "unicode":
            limits = rng.choices([0x80, 0x800, 0x10000, 0x110000], k=size)
            characters = map(chr, map(rng.randrange, limits))
            return "".join(each for each in characters if not "\ud800" <= each <= "\udfff")
    return rng.choice(lines)[rng.randrange(5) :] + rng.choice(AWKWARD) + rng.choice(lines)


def encoded(cache: WordCache, texts: list[str]) -> list[list[int]]:
    ids, lengths = cache.encode(texts)
    assert lengths.sum() == len(ids)
    ends = np.cumsum(lengths)
    return [ids[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_ids_are_those_of_sentencepiece(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    model = make_model(variant, **VARIANTS[variant])
    assert obstacle(model.read_bytes()) is None
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    rng = random.Random(variant)
    lines = [line for text in source_texts() for line in text.split("\n") if line] + SCRIPTS
    for slots, window in [(64, 1), (64, 7), (128, 100), (4096, 1000), (1 << 14, 1 << 17)]:
        monkeypatch.setattr(word_cache, "WINDOW_BYTES", window)
        cache = WordCache(model, rng.choice([np.uint16, np.int32]), slots)
        for size in (0, 1, 40, 200):
            texts = [random_text(rng, lines) for _ in range(size)]
            assert encoded(cache, texts) == processor.encode(texts)


def test_whole_documents_and_a_warm_cache(make_model: Callable[..., Path]) -> None:
    model = make_model("as LLaMA's", add_dummy_prefix=True)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(source_texts())
    cache = WordCache(model, np.uint16)
    assert encoded(cache, source_texts()) == expected
    pieces = cache.used
    assert encoded(cache, source_texts()) == expected
    assert cache.kept <= pieces
    ids, _lengths = cache.encode(source_texts())
    assert ids.dtype == np.uint16


def test_the_cache_stays_bounded(make_model: Callable[..., Path]) -> None:
    cache = WordCache(make_model("as trained here"), np.int32, slots=1 << 11)
    texts = source_texts() * 2
    expected = cache.processor.encode(texts)
    found, used = [], [0]
    for text in texts:
        found += encoded(cache, [text])
        used.append(cache.tables[0].used)
    assert found == expected
    assert max(used) <= 1 << 10
    assert any(after < before for before, after in itertools.pairwise(used)), "it never started anew"
    assert len(cache.pool) <= 1 << 16


def test_a_word_without_end_is_no_special_case(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word_cache, "WINDOW_BYTES", 64)
    cache = WordCache(make_model("as trained here"), np.uint16)
    texts = ["e" * 5000, "s" * 200_000 + " end", "漢" * 1000]
    assert encoded(cache, texts) == cache.processor.encode(texts)


def changed(model: Path, change: Callable[[Any], None]) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    change(proto)
    return proto.SerializeToString()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.trainer_spec, "model_type", 1), "not a BPE model"),
        (lambda m: setattr(m.trainer_spec, "byte_fallback", False), "no byte fallback"),
        (lambda m: setattr(m.trainer_spec, "treat_whitespace_as_suffix", True), "behind the word"),
        (lambda m: setattr(m.normalizer_spec, "precompiled_charsmap", b"x"), r"normalizes text \(identity\)"),
        (lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True), "removes extra spaces"),
        (lambda m: setattr(m.normalizer_spec, "escape_whitespaces", False), "does not escape spaces"),
        (lambda m: setattr(m.pieces[-1], "type", 4), "is user-defined"),
        (lambda m: setattr(m.pieces[-1], "type", 5), "is unused"),
        (lambda m: setattr(m.pieces[-1], "piece", "a\nb"), "holds a line end"),
        (lambda m: setattr(m.pieces[-1], "piece", "a\0"), "or a zero byte"),
    ],
)
def test_what_is_against_the_cache_is_named(
    make_model: Callable[..., Path], change: Callable[[Any], None], reason: str
) -> None:
    found = obstacle(changed(make_model("as trained here"), change))
    assert found is not None
    assert re.search(reason, found)
