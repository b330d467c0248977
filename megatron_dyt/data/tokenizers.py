"""The tokenizers that data are prepared with: SentencePiece models and Hugging Face tokenizers."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_dyt.atomic import read_json, sha256
from megatron_dyt.data.dataset_manifest import HUGGING_FACE, SENTENCEPIECE, TokenizerIdentity
from megatron_dyt.data.word_cache import Ids, WordCache, obstacle
from megatron_dyt.data.word_table import Integers
from megatron_dyt.errors import UserError

# Megatron's names for --tokenizer-type, and which of ours they are.
TOKENIZER_KINDS = {
    SENTENCEPIECE: SENTENCEPIECE,
    "GPTSentencePieceTokenizer": SENTENCEPIECE,
    "Llama2Tokenizer": SENTENCEPIECE,
    HUGGING_FACE: HUGGING_FACE,
}

# D texts -> the ids of all of them one after the other, (T,), and how many each has, (D,).
Encoder = Callable[[Sequence[str]], tuple[Ids, Integers]]

# As Megatron's DType.optimal_dtype.
_UINT16_VOCABULARY = 65500


@dataclass(frozen=True)
class Tokenizer:
    """What is known of a tokenizer without loading it; goes to the workers, which call `encoder`.

    Attributes:
        kind: Megatron's --tokenizer-type.
        name: as it was given.
        file: the SentencePiece model or the tokenizer.json.
        sha256: of `file`.
        vocab_size: largest id + 1.
        bos, eos: ids; None where the tokenizer has none.
        obstacle: why the word cache cannot be used; None when it can.
    """

    kind: str
    name: str
    file: Path
    sha256: str
    vocab_size: int
    bos: int | None
    eos: int | None
    obstacle: str | None

    @property
    def dtype(self) -> npt.DTypeLike:
        """The smallest type for ids that Megatron reads."""
        return np.uint16 if self.vocab_size < _UINT16_VOCABULARY else np.int32

    def identity(self) -> TokenizerIdentity:
        """What a manifest says of it."""
        return TokenizerIdentity(self.kind, self.sha256, self.bos, self.eos)

    def encoder(self) -> Encoder:
        """Load it. The ids have no BOS or EOS."""
        if self.kind == HUGGING_FACE:
            return _hugging_face_encoder(self.file, self.dtype)
        if self.obstacle is None:
            return WordCache(self.file, self.dtype).encode
        processor = load_sentencepiece(self.file)
        return lambda texts: _flat(processor.encode(list(texts), num_threads=1), self.dtype)


def find(kind: str, name: str) -> Tokenizer:
    """The SentencePiece model at the path `name`, or the Hugging Face tokenizer of that name or directory.

    Raises:
        UserError: it is missing or unreadable.
    """
    return _find_hugging_face(name) if kind == HUGGING_FACE else _find_sentencepiece(name)


def tokenizer_sha256(kind: str, name: str) -> str | None:
    """The hash by which a tokenizer is known; None when its file is not on this machine."""
    path = tokenizer_file(kind, name)
    if path is None or not path.is_file():
        return None
    return sha256(path)


def tokenizer_file(kind: str, name: str) -> Path | None:
    """The file that makes a tokenizer: the SentencePiece model, or tokenizer.json.

    A name on the Hugging Face Hub is looked up in the local cache alone.
    """
    path = Path(name)
    if kind == SENTENCEPIECE:
        return path
    if path.is_dir():
        return path / "tokenizer.json"
    if path.name == "tokenizer.json":
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def load_sentencepiece(path: Path) -> Any:
    """A `SentencePieceProcessor`; `UserError` when the file is missing or not a model."""
    import sentencepiece

    if not path.is_file():
        raise UserError(f"tokenizer model {path} does not exist; make one with megatron-dyt train-tokenizer")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"tokenizer model {path} is not a SentencePiece model, or is cut off; train or copy it again"
        ) from error


def _find_sentencepiece(name: str) -> Tokenizer:
    path = Path(name)
    processor = load_sentencepiece(path)
    bos, eos = processor.bos_id(), processor.eos_id()
    return Tokenizer(
        kind=SENTENCEPIECE,
        name=name,
        file=path,
        sha256=sha256(path),
        vocab_size=processor.vocab_size(),
        bos=bos if bos >= 0 else None,
        eos=eos if eos >= 0 else None,
        obstacle=obstacle(path.read_bytes()),
    )


def _find_hugging_face(name: str) -> Tokenizer:
    path = tokenizer_file(HUGGING_FACE, name) or _download(name)
    if not path.is_file():
        raise UserError(
            f"tokenizer {name}: {path} does not exist. Write it with transformers: "
            f"AutoTokenizer.from_pretrained({name!r}).save_pretrained({name!r})"
        )
    tokenizer = _load_hugging_face(path)
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    special = _special_tokens(path, name)
    return Tokenizer(
        kind=HUGGING_FACE,
        name=name,
        file=path,
        sha256=sha256(path),
        vocab_size=max(ids) + 1,
        bos=tokenizer.token_to_id(special.get("bos_token", "")),
        eos=tokenizer.token_to_id(special.get("eos_token", "")),
        obstacle="it is a Hugging Face tokenizer",
    )


def _download(name: str, file: str = "tokenizer.json") -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(name, file))
    # A bad name, no network, no such repository: errors without a common base.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"tokenizer {name}: neither a directory with a tokenizer.json nor to be had from the Hugging "
            f"Face Hub ({reason})"
        ) from error


def _beside(path: Path, name: str, file: str) -> Path:
    """Another file of the tokenizer `name`, whose tokenizer.json is `path`."""
    found = path.with_name(file)
    return found if found.is_file() or Path(name).exists() else _download(name, file)


def _special_tokens(path: Path, name: str) -> dict[str, str]:
    """The names of BOS and EOS by tokenizer_config.json, which is beside tokenizer.json.

    What it does not name may be in special_tokens_map.json, where older versions of transformers wrote it.
    """
    config = _beside(path, name, "tokenizer_config.json")
    try:
        settings = json.loads(config.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"tokenizer {name}: {config} is missing or not JSON; it names the tokens for the begin and the "
            "end of a document"
        ) from error
    named = {key: settings.get(key) for key in ("bos_token", "eos_token")}
    if not all(named.values()):
        with contextlib.suppress(UserError):  # Many tokenizers have no such file.
            others = read_json(_beside(path, name, "special_tokens_map.json")) or {}
            named = {key: value or others.get(key) for key, value in named.items()}
    # A token is its text, or a dictionary with it.
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _load_hugging_face(path: Path) -> Any:
    # The workers are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises plain Exception.
        raise UserError(f"{path} is not a Hugging Face tokenizer ({error})") from error
    # "</s>" in a document is text, not the end of the document.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _hugging_face_encoder(path: Path, dtype: npt.DTypeLike) -> Encoder:
    tokenizer = _load_hugging_face(path)

    def encode(texts: Sequence[str]) -> tuple[Ids, Integers]:
        found = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _flat([each.ids for each in found], dtype)

    return encode


def _flat(lists: list[list[int]], dtype: npt.DTypeLike) -> tuple[Ids, Integers]:
    ids = np.fromiter(itertools.chain.from_iterable(lists), dtype)
    return ids, np.array([len(each) for each in lists], np.int64)
