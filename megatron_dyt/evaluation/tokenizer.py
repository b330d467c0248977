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


def prefix_token(tokenizer: TextTokenizer, bos: bool = True) -> int:
    """What contexts begin with: the tokenizer's BOS; its end-of-document token without one or `bos`."""
    try:
        begin = tokenizer.bos if bos else None
    except (AttributeError, NotImplementedError):
        begin = None
    return tokenizer.eod if begin is None or begin < 0 else begin
