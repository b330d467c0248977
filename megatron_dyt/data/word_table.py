"""A hash table of words, looked up by the thousand in NumPy.

A Python dict costs about 300 ns for each word of a text, most of it for making a string and for waiting
for memory. Here a word is one or a few 64-bit integers taken from the text where it lies, and thousands
of look-ups wait for memory together.

Shapes: W words that are looked up together, S slots of the table, K integers per key.
"""

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

_BYTES = 8
# _LOW[n] keeps the first n bytes of a little-endian integer.
_LOW = np.array([(1 << 8 * count) - 1 for count in range(_BYTES + 1)], np.uint64)
# Fibonacci hashing: odd multipliers with well mixed bits, one for each integer of a key.
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)


class WordTable:
    """Words of up to 8 * `width` bytes, each with a positive integer.

    Open addressing with linear probing. Words are padded with zeros to a key of `width` integers, so a
    word must not hold a zero byte, but for the word that is one zero byte and no more.

    Args:
        width: integers per key (K), 1 to 4.
        slots: size of the table (S), a power of two.
    """

    def __init__(self, width: int, slots: int) -> None:
        self.width = width
        self.multipliers = np.array(_MULTIPLIERS[:width], np.uint64)  # (K,)
        self.shift = np.uint64(64 - (slots.bit_length() - 1))
        self.mask = slots - 1
        self.keys = np.zeros((slots, width), np.uint64)  # (S, K)
        self.values = np.zeros(slots, np.int64)  # (S,), 0 where a slot is free
        self.used = 0

    def has_room(self, count: int) -> bool:
        """Whether it is half full at most with `count` more words."""
        return 2 * (self.used + count) <= len(self.values)

    def clear(self) -> None:
        """Forget all words."""
        self.values.fill(0)
        self.used = 0

    def keys_of(self, text: npt.NDArray[np.uint8], starts: Integers, lengths: Integers) -> Keys:
        """Keys, (W, K), of the words at `starts`, (W,), after which `text` has 8 * K bytes or more."""
        # The eight bytes from every position of the text on, as integers: a view.
        integers = np.ndarray((len(text) - _BYTES + 1,), np.uint64, text.data, strides=(1,))
        keys = np.empty((len(starts), self.width), np.uint64)
        for column in range(self.width):
            inside = np.clip(lengths - _BYTES * column, 0, _BYTES)
            keys[:, column] = integers[starts + _BYTES * column] & _LOW[inside]
        return keys

    def find(self, keys: Keys) -> Integers:
        """The value of each key, (W, K) -> (W,); 0 where it is not in the table."""
        slots = self._home(keys)
        values = self.values[slots]
        other = (values != 0) & ~self._holds(slots, keys)
        # Where another word sits, this one may be further on.
        todo = np.flatnonzero(other)
        values[todo] = 0
        while todo.size:
            slots[todo] = (slots[todo] + 1) & self.mask
            there = self.values[slots[todo]]
            equal = self._holds(slots[todo], keys[todo])
            values[todo[equal]] = there[equal]
            todo = todo[(there != 0) & ~equal]
        return values

    def claim(self, keys: Keys) -> tuple[Integers, Integers]:
        """Places for keys, (W, K), which may repeat: the slot of each, (W,), and which are new (each once).

        The caller has made sure of `has_room`, and sets `values` at the slots of the new ones next.
        """
        slots = self._home(keys)
        todo = np.arange(len(keys))
        new = []
        while todo.size:
            free = todo[self.values[slots[todo]] == 0]
            # Of those that want the same slot, the one whose mark stays gets it.
            self.values[slots[free]] = -1 - free
            won = free[self.values[slots[free]] == -1 - free]
            self.keys[slots[won]] = keys[won]
            new.append(won)
            todo = todo[~self._holds(slots[todo], keys[todo])]
            slots[todo] = (slots[todo] + 1) & self.mask
        winners = np.concatenate(new) if new else todo
        self.used += len(winners)
        return slots, winners

    def _home(self, keys: Keys) -> Integers:
        """The slot where the search for each key begins, (W, K) -> (W,)."""
        mixed = keys[:, 0] * self.multipliers[0]
        for column in range(1, self.width):
            mixed ^= (keys[:, column] + mixed) * self.multipliers[column]
        return (mixed >> self.shift).astype(np.int64)

    def _holds(self, slots: Integers, keys: Keys) -> npt.NDArray[np.bool_]:
        """Whether the last word written at each slot is the key beside it: (W,), (W, K) -> (W,)."""
        if self.width == 1:
            return self.keys[:, 0][slots] == keys[:, 0]
        return (self.keys[slots] == keys).all(axis=1)
