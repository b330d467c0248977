"""Inputs that the data tests share."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path

VOCAB_SIZE = 600


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """Write one {"text": ...} a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def source_texts() -> list[str]:
    """Ten modules of the standard library, which every installation has."""
    names = "argparse ast base64 bisect calendar cmd code copy csv enum"
    root = Path(sysconfig.get_path("stdlib"))
    return [(root / f"{name}.py").read_bytes().decode() for name in names.split()]
