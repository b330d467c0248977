"""SentencePiece's token ids, several times faster: each word is encoded once.

BPE joins two neighbouring characters only into a piece of the vocabulary. So where no piece has two given
bytes beside each other, the text can be cut between them: both sides are tokenized as if they stood alone,
and the ids of each such word are computed once and looked up afterwards. With LLaMA's vocabulary these are
the places before a space or after a line end, and more: around digits, between letters and brackets,
between Chinese characters. The ids are those of `SentencePieceProcessor.encode`, on every text.

That holds for BPE models that neither change the text nor give a meaning to anything but its characters;
`obstacle` names what in a model is against it.

Shapes: D texts, B bytes of all texts in a row, W words of a window of it, T ids. A word is given by where it
starts in the text and how many bytes it has.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dyt.data.word_table import Integers, WordTable

Ids = npt.NDArray[Any]
Text = npt.NDArray[np.uint8]

# Bytes of text that are looked up at a time: starts, keys and values of their words stay in a processor's
# second-level cache.
WINDOW_BYTES = 1 << 17
# Bytes of words that are encoded at a time. SentencePiece takes more than linear time for long texts.
_ENCODE_BYTES = 1 << 14
# Keys and values take 8 + 8 bytes per slot of the first table, 32 + 8 of the second: 56 MB in all.
_SLOTS = 1 << 20
# A word's value in a table: where its ids are in the pool, and how many. At worst a line of 64 MiB is one
# word, with an id per byte.
_COUNT_BITS = 28
_COUNT_MASK = (1 << _COUNT_BITS) - 1
_SPACE = "▁"


def obstacle(model: bytes) -> str | None:
    """Why words of this serialized SentencePiece model cannot be encoded one by one; None if they can."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = proto.SentencePiece
    special = {kinds.USER_DEFINED: "user-defined", kinds.UNUSED: "unused"}
    for piece in proto.pieces:
        if piece.type in special:
            return f"piece {piece.piece!r} is {special[piece.type]}"
        if piece.type == kinds.NORMAL and ("\n" in piece.piece or "\0" in piece.piece):
            return f"piece {piece.piece!r} holds a line end or a zero byte"
    reasons = (
        # A unigram model adds up scores over the whole text: rounding decides ties by what stands before.
        (trainer.model_type != trainer.BPE, "it is not a BPE model"),
        # Unknown characters beside each other would be one token.
        (not trainer.byte_fallback, "it has no byte fallback"),
        (trainer.treat_whitespace_as_suffix, "it puts a word's space behind the word"),
        (bool(normalizer.precompiled_charsmap), f"it normalizes text ({normalizer.name or 'custom rule'})"),
        (normalizer.remove_extra_whitespaces, "it removes extra spaces"),
        (not normalizer.escape_whitespaces, "it does not escape spaces"),
    )
    return next((reason for holds, reason in reasons if holds), None)


class WordCache:
    """`SentencePieceProcessor.encode` for many texts, with a cache of words of about 70 MB.

    Args:
        model: a SentencePiece model file that has no `obstacle`.
        dtype: of the ids.
        slots: size of the two hash tables, a power of two; when one is half full, the cache starts anew.
    """

    def __init__(self, model: Path, dtype: npt.DTypeLike, slots: int = _SLOTS) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        serialized = model.read_bytes()
        proto = sentencepiece_model_pb2.ModelProto.FromString(serialized)
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
        # What the normalizer puts in front of a text that is not empty.
        self.prefix = b" " if proto.normalizer_spec.add_dummy_prefix else b""
        # (65536,) bool: whether text may be cut between two bytes.
        self.cuts = _cuts(piece.piece for piece in proto.pieces if piece.type == piece.NORMAL)
        # Most words have up to 8 bytes; beyond 32 hardly one comes again.
        self.tables = (WordTable(1, slots), WordTable(4, slots))
        # The ids of all words, one word after the other; grows.
        self.pool: Ids = np.empty(1 << 16, dtype)
        # Ids in the pool, and those among them that stay when a window is done.
        self.used, self.kept = 0, 0
        self.full = False
        self.newline = int(self.processor.encode("\n")[-1])
        self._start_anew()

    def encode(self, texts: Sequence[str]) -> tuple[Ids, Integers]:
        """The ids of all texts one after the other, (T,), and the number of ids of each text, (D,) int64."""
        text, begins, end = self._join(texts)
        found: list[Ids] = []
        # For each text how many ids come before it: (D,) in pieces, those that begin in each window.
        before: list[Integers] = []
        total = 0
        for starts, stop in self._windows(text, begins, end):
            values = self._look_up(text, starts, np.diff(starts, append=stop))
            counts = values & _COUNT_MASK  # (W,) ids per word
            ends = np.cumsum(counts)  # (W,)
            first, last = np.searchsorted(begins, (starts[0], stop))
            words = np.searchsorted(starts, begins[first:last])  # The texts' first words, by number.
            before.append(total + ends[words] - counts[words])
            found.append(self._gather(values >> _COUNT_BITS, counts, ends))
            total += int(ends[-1])
        # Empty texts at the very end begin in no window.
        before.append(np.full(len(texts) - sum(map(len, before)), total))
        ids = np.concatenate(found) if found else self.pool[:0]
        return ids, np.diff(np.concatenate(before), append=total)

    def _join(self, texts: Sequence[str]) -> tuple[Text, Integers, int]:
        """All texts as bytes, (B,) and some; where each begins, (D,); and where the last one ends, B."""
        # In a text the character that stands for a space in pieces is a space too.
        parts = [self.prefix + text.replace(_SPACE, " ").encode() if text else b"" for text in texts]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        end = int(ends[-1]) if parts else 0
        # A key is read whole, so there must be something after the last word.
        parts.append(bytes(8 * self.tables[-1].width))
        sizes = np.diff(ends, prepend=0)
        return np.frombuffer(b"".join(parts), np.uint8), ends - sizes, end

    def _windows(self, text: Text, begins: Integers, end: int) -> Iterator[tuple[Integers, int]]:
        """Cut the text into words, some `WINDOW_BYTES` at a time: their starts, (W,); where the last ends."""
        start, size = 0, WINDOW_BYTES
        while start < end:
            stop = min(start + size, end)
            starts = self._words(text, begins, start, stop)
            if stop < end:
                # The last word may go on.
                starts, stop = starts[:-1], int(starts[-1])
            if len(starts):
                yield starts, stop
                start, size = stop, WINDOW_BYTES
            else:
                size *= 2

    def _words(self, text: Text, begins: Integers, start: int, stop: int) -> Integers:
        """Where words start in text[start:stop], (W,); one starts at `start`."""
        pairs = text[start : stop - 1].astype(np.uint16)
        pairs <<= 8
        pairs |= text[start + 1 : stop]
        cut = np.ones(stop - start, np.bool_)
        cut[1:] = self.cuts.take(pairs)
        first, last = np.searchsorted(begins, (start, stop))
        cut[begins[first:last] - start] = True
        return np.flatnonzero(cut) + start

    def _look_up(self, text: Text, starts: Integers, lengths: Integers) -> Integers:
        """The value of each word, (W,): those in the tables, then those that must be encoded."""
        if self.full:
            self._start_anew()
        # What the last window alone had is not kept.
        self.used = self.kept
        values = np.zeros(len(starts), np.int64)
        shortest = 0
        for table in self.tables:
            longest = 8 * table.width
            mine = np.flatnonzero((lengths > shortest) & (lengths <= longest))
            values[mine] = self._look_up_in(table, text, starts[mine], lengths[mine])
            shortest = longest
        self.kept = self.used
        rest = np.flatnonzero(values == 0)
        values[rest] = self._encode_words(text, starts[rest], lengths[rest])
        return values

    def _look_up_in(self, table: WordTable, text: Text, starts: Integers, lengths: Integers) -> Integers:
        """The values of words that fit into `table`, with new ones encoded; 0 when it is full."""
        keys = table.keys_of(text, starts, lengths)
        values = table.find(keys)
        missing = np.flatnonzero(values == 0)
        if not table.has_room(len(missing)):
            self.full = True
        elif missing.size:
            slots, new = table.claim(keys[missing])
            words = missing[new]
            table.values[slots[new]] = self._encode_words(text, starts[words], lengths[words])
            values[missing] = table.values[slots]
        return values

    def _encode_words(self, text: Text, starts: Integers, lengths: Integers) -> Integers:
        """Encode words that the tables do not have, put their ids into the pool; their values, (W,)."""
        words = [
            text[start : start + length].tobytes()
            for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        groups = np.cumsum(lengths) // _ENCODE_BYTES
        edges = np.flatnonzero(np.diff(groups, prepend=-1, append=-1)).tolist()
        values = [self._encode_group(words[first:last]) for first, last in itertools.pairwise(edges)]
        return np.concatenate(values) if values else starts

    def _encode_group(self, words: list[bytes]) -> Integers:
        """`_encode_words` of a few, in one text with line ends between them."""
        joined = b"\n" + b"\n".join(words)
        ids = np.array(self.processor.encode(joined.decode()), self.pool.dtype)
        # Before the first line end there may be the prefix's id.
        ends = np.flatnonzero(ids == self.newline)
        assert len(ends) == len(words), "a word holds a line end, or one is missing"
        counts = np.diff(ends, append=len(ids)) - 1
        ids = ids[ends[0] :]
        return self._keep(ids[ids != self.newline], counts)

    def _keep(self, ids: Ids, counts: Integers) -> Integers:
        """Append the ids of some words to the pool; the words' values."""
        while self.used + len(ids) > len(self.pool):
            self.pool = np.concatenate([self.pool, np.empty_like(self.pool)])
        self.pool[self.used : self.used + len(ids)] = ids
        offsets = self.used + np.cumsum(counts) - counts
        self.used += len(ids)
        return (offsets << _COUNT_BITS) | counts

    def _gather(self, offsets: Integers, counts: Integers, ends: Integers) -> Ids:
        """The ids of words in a row, (T,): `counts` from each of `offsets`; `ends` are sums of `counts`."""
        index = np.arange(ends[-1])
        index += np.repeat(offsets - (ends - counts), counts)
        return self.pool.take(index)

    def _start_anew(self) -> None:
        """Empty the cache but for the line end, which divides the words that are encoded together."""
        for table in self.tables:
            table.clear()
        self.used = self.kept = 0
        self.full = False
        line_end = np.frombuffer(b"\n".ljust(8 * self.tables[0].width, b"\0"), np.uint64).reshape(1, -1)
        slots, _new = self.tables[0].claim(line_end)
        self.tables[0].values[slots] = self._keep(np.array([self.newline], self.pool.dtype), np.array([1]))
        self.kept = self.used


def _cuts(pieces: Iterable[str]) -> npt.NDArray[np.bool_]:
    """Whether text may be cut between two bytes, (65536,), by 256 * first + second."""
    cuts = np.ones((256, 256), np.bool_)
    # Not within a character: its second and later bytes are 0x80 to 0xBF.
    cuts[:, 0x80:0xC0] = False
    for piece in pieces:
        text = np.frombuffer(piece.replace(_SPACE, " ").encode(), np.uint8)
        cuts[text[:-1], text[1:]] = False
    return cuts.ravel()
