"""What an evaluation asks of Megatron's tokenizers."""

from __future__ import annotations

from typing import Protocol


class TextTokenizer(Protocol):
    """What is used of Megatron's tokenizers."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eod(self) -> int: ...
    def tokenize(self, text: str) -> list[int]: ...
    def detokenize(self, ids: list[int]) -> str: ...


def prefix_token(tokenizer: TextTokenizer) -> int:
    """The tokenizer's BOS, or its end-of-document token when it has none."""
    try:
        bos = tokenizer.bos
    except (AttributeError, NotImplementedError):
        bos = None
    return tokenizer.eod if bos is None or bos < 0 else bos
