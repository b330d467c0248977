"""The hash table of words against a dict."""

import random

import numpy as np
import pytest

from megatron_dyt.data.word_table import WordTable


def keys_of(table: WordTable, words: list[bytes]) -> np.ndarray:
    lengths = np.array([len(word) for word in words])
    text = np.frombuffer(b"".join(words) + bytes(8 * table.width), np.uint8)
    return table.keys_of(text, np.cumsum(lengths) - lengths, lengths)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("slots", [64, 4096])
def test_it_holds_what_a_dict_holds(width: int, slots: int) -> None:
    rng = random.Random(width)
    table, expected = WordTable(width, slots), {}
    # Few letters, so that words come again and differ in their last byte alone.
    words = [bytes(rng.choices(b"ab", k=rng.randint(1, 8 * width))) for _ in range(6 * slots)] + [b"\0"]
    for start in range(0, len(words), 7):
        batch = words[start : start + 7]
        if not table.has_room(len(batch)):
            break
        keys = keys_of(table, batch)
        assert table.find(keys).tolist() == [expected.get(word, 0) for word in batch]
        missing = np.flatnonzero(table.find(keys) == 0)
        places, new = table.claim(keys[missing])
        assert len({batch[missing[index]] for index in new}) == len(new)
        for index in new:
            expected[batch[missing[index]]] = len(expected) + 1
            table.values[places[index]] = len(expected)
        assert table.find(keys).tolist() == [expected[word] for word in batch]
        assert table.used == len(expected)
    assert len(expected) > min(slots // 3, 2**width)
    assert table.find(keys_of(table, list(expected))).tolist() == list(expected.values())


def test_the_zero_byte_is_a_word_and_not_an_empty_slot() -> None:
    table = WordTable(1, 64)
    keys = keys_of(table, [b"\0"])
    assert table.find(keys).tolist() == [0]
    slots, new = table.claim(np.concatenate([keys, keys]))
    assert (len(new), slots[0]) == (1, slots[1])
    table.values[slots[new]] = 5
    assert table.find(keys).tolist() == [5]


def test_words_that_fight_for_one_slot_all_get_in() -> None:
    table = WordTable(1, 64)
    keys = np.arange(1, 33, dtype=np.uint64).reshape(-1, 1)
    table.multipliers = np.zeros(1, np.uint64)  # every word's search begins at slot 0
    assert table.has_room(32)
    slots, new = table.claim(keys)
    table.values[slots[new]] = new + 1
    assert sorted(slots) == list(range(32))
    assert table.find(keys).tolist() == list(range(1, 33))
    assert table.find(np.array([[99]], np.uint64)).tolist() == [0]
    assert not table.has_room(1)


def test_nothing_is_found_after_clear() -> None:
    table = WordTable(2, 64)
    keys = keys_of(table, [b"one", b"a longer word"])
    slots, new = table.claim(keys)
    table.values[slots[new]] = 7
    table.clear()
    assert table.find(keys).tolist() == [0, 0]
    assert table.has_room(32)


def test_a_word_ends_where_its_length_says() -> None:
    table = WordTable(2, 64)
    text = np.frombuffer(b"abcdefghijklmnop" + b"x" * 16, np.uint8)
    starts, lengths = np.array([0, 0, 3]), np.array([3, 12, 1])
    found = table.keys_of(text, starts, lengths).view(np.uint8).tobytes()
    assert found == b"abc".ljust(16, b"\0") + b"abcdefghijkl".ljust(16, b"\0") + b"d".ljust(16, b"\0")
