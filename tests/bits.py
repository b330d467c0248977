"""Damage of the smallest kind."""

from pathlib import Path


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Flip a bit of the byte at `place` of a file; the same again puts it back."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
