"""What determines the ids of a corpus, and which part of it a shard is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_dyt.data.records import Document, Fields
from megatron_dyt.data.sources import Source
from megatron_dyt.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Filters:
    """Which documents are left out; none by default.

    Attributes:
        min_characters, max_characters: limits of a document's length.
        domains: if given, only documents of these are taken.
        not_domains: documents of these are left out.
    """

    min_characters: int = 0
    max_characters: int | None = None
    domains: tuple[str, ...] = ()
    not_domains: tuple[str, ...] = ()

    def why_not(self, document: Document) -> str | None:
        """Why a document is left out; None when it is not."""
        size = len(document.text)
        if size < self.min_characters:
            return "too short"
        if self.max_characters is not None and size > self.max_characters:
            return "too long"
        if (self.domains and document.domain not in self.domains) or document.domain in self.not_domains:
            return "domain"
        return None


@dataclass(frozen=True)
class Settings:
    """What determines the ids, besides the sources."""

    tokenizer: Tokenizer
    bos: bool = True
    append_eod: bool = True
    fields: Fields = field(default_factory=Fields)
    filters: Filters = field(default_factory=Filters)

    def made_from(self) -> dict[str, Any]:
        """As a manifest holds it: equal for equal data, wherever the tokenizer's file is."""
        tokenizer = self.tokenizer
        made_from = {
            "tokenizer": {
                **{"type": tokenizer.kind, "sha256": tokenizer.sha256},
                # A Hugging Face tokenizer has them in another file than that of the hash.
                **{"bos": tokenizer.bos, "eos": tokenizer.eos},
            },
            **{"bos": self.bos, "append_eod": self.append_eod},
            **{"fields": asdict(self.fields), "filters": asdict(self.filters)},
        }
        as_json: dict[str, Any] = json.loads(json.dumps(made_from))
        return as_json


@dataclass(frozen=True)
class Shard:
    """One dataset to be written: its prefix, and the sources that go into it one after the other."""

    prefix: Path
    sources: tuple[Source, ...]

    @property
    def size(self) -> int:
        """Bytes to read, 0 where unknown."""
        return sum(source.size for source in self.sources)

    def identities(self) -> list[dict[str, Any]]:
        """What changes when the content of the sources does."""
        return [source.identity() for source in self.sources]
