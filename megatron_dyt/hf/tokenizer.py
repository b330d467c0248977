"""A training run's tokenizer as files that transformers' AutoTokenizer loads."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dyt.data.dataset_manifest import HUGGING_FACE, SENTENCEPIECE
from megatron_dyt.data.tokenizer_check import check_tokenizer, documents_begin_with_bos
from megatron_dyt.data.tokenizers import TOKENIZER_KINDS
from megatron_dyt.errors import UserError, describe
from megatron_dyt.hf import register_auto_classes

# What a conversion gets wrong shows in spaces, digits, line ends, bytes outside the vocabulary, and scripts.
PROBES = (
    "Hello world, this is a test.",
    "  two  spaces,\ttab and\n\nlines\r\n",
    "x = 12345.67e-8; y[0] += f(1, 2)  # 100%",
    " leading and trailing ",
    "naïve café — “quotes” … £5 ½",
    "日本語 и русский, العربية",
    "🙂👩‍🚀 \u200b\ufeff\x00\x7f",
    "▁ is SentencePiece's own space",
    "",
)


class TokenizerFacts(NamedTuple):
    """What the model's configuration needs of a tokenizer."""

    vocab_size: int  # Rows of the embedding that its ids need.
    bos: int | None  # What a document begins with, or where it has no BOS, what ends the one before.
    eos: int | None
    pad: int | None


def type_of(model: str) -> str:
    """Megatron's type of the tokenizer `model`, given for a run that had none."""
    if Path(model).is_dir():
        return HUGGING_FACE
    if Path(model).is_file() and model.endswith(".model"):
        return SENTENCEPIECE
    raise UserError(
        f"--tokenizer-model {model}: the run had no tokenizer; give a SentencePiece model (*.model) or the "
        "directory of a Hugging Face tokenizer"
    )


def write_tokenizer(args: Namespace, directory: Path, bos: bool | None = None) -> TokenizerFacts:
    """Write the tokenizer of the run with these stored arguments into `directory`.

    AutoTokenizer then gives the ids that the run's own tokenizer gives, with BOS in front where the training
    documents have it; but a special token's name in a text becomes that token. `bos` says whether they have
    it; None is as the manifests of the training data say, and yes where none is in reach. Without BOS in
    them EOS is called `bos_token`, as with GPT-2: what a first token follows. Padding is at the left, by the
    token for the unknown where the model has none for it. A Hugging Face tokenizer is copied as it is.

    Raises:
        UserError: a tokenizer that is missing, of a kind that cannot be exported, or whose conversion
            gives other ids than the original.
    """
    check_tokenizer(vars(args))
    kind = TOKENIZER_KINDS.get(args.tokenizer_type)
    if kind == SENTENCEPIECE:
        if bos is None:
            bos = documents_begin_with_bos(args)
        model, length = Path(args.tokenizer_model), args.max_position_embeddings
        return _write_sentencepiece(model, directory, length, bos is not False)
    if kind == HUGGING_FACE:
        if bos is not None:
            raise UserError(
                f"--{'' if bos else 'no-'}bos was given, but the tokenizer {args.tokenizer_model} is a "
                "Hugging Face one, which says itself what a text begins with. Leave the flag out"
            )
        return _copy(str(args.tokenizer_model), directory)
    *others, last = TOKENIZER_KINDS
    raise UserError(
        f"the run's tokenizer is a {args.tokenizer_type}; exported are {', '.join(others)} and {last}. Give "
        "--no-tokenizer to export the model without one"
    )


def _write_sentencepiece(model: Path, directory: Path, max_length: int, with_bos: bool) -> TokenizerFacts:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    _refuse_other_models(proto, model)
    original = sentencepiece.SentencePieceProcessor(model_file=str(model))
    with_bos = with_bos and original.bos_id() >= 0
    ids = {
        "unk": original.unk_id(),
        "bos": original.bos_id() if with_bos else original.eos_id(),
        "eos": original.eos_id(),
        # Not EOS, as whose loss a fine-tuning that leaves out padding would leave out the end of each text.
        "pad": original.pad_id() if original.pad_id() >= 0 else original.unk_id(),
    }
    known = {f"{name}_token": original.id_to_piece(piece) for name, piece in ids.items() if piece >= 0}
    converted = PreTrainedTokenizerFast(
        tokenizer_object=_backend(proto, original, with_bos),
        clean_up_tokenization_spaces=False,
        padding_side="left",  # As LLaMA's: a generated text follows its prompt.
        model_max_length=max_length,
        **known,
    )
    converted.save_pretrained(str(directory))
    _complete_settings(directory / "tokenizer_config.json", with_bos)
    shutil.copyfile(model, directory / "tokenizer.model")
    _compare(original, directory, model, _defined(proto))
    bos, eos, pad = (ids[name] if ids[name] >= 0 else None for name in ("bos", "eos", "pad"))
    return TokenizerFacts(original.get_piece_size(), bos, eos, pad)


def _complete_settings(path: Path, bos: bool) -> None:
    """Add what saving leaves out, and the class name that older versions of transformers know too."""
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bos, "add_eos_token": False}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _backend(proto: Any, original: Any, with_bos: bool) -> Any:
    """The `tokenizers.Tokenizer` that does what a SentencePiece BPE model does, with BOS first if asked.

    transformers' LlamaTokenizer is not that: it adds no second space to a text that begins with one.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    pieces = [piece.piece for piece in proto.pieces]
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == proto.SentencePiece.NORMAL}
    defined = _defined(proto)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=_merges(scores),
            unk_token=pieces[original.unk_id()],
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
            # A user-defined symbol is no merge of others: as a word of its own it is taken as it is.
            ignore_merges=bool(defined),
        )
    )
    if defined:
        # SentencePiece takes the longest that begins at a place, and merges nothing with it. Added tokens
        # would not do: each part of a text beside one gets a space in front.
        longest_first = "|".join(map(re.escape, sorted(defined, key=len, reverse=True)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    prefix = proto.normalizer_spec.add_dummy_prefix
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    unspaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*unspaces, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    special = (proto.SentencePiece.UNKNOWN, proto.SentencePiece.CONTROL)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in proto.pieces
            if piece.type in special
        ]
    )
    if with_bos:
        bos_id = original.bos_id()
        bos = pieces[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _refuse_other_models(proto: Any, model: Path) -> None:
    found = [
        what
        for what, there in (
            ("is no BPE model", proto.trainer_spec.model_type != proto.trainer_spec.BPE),
            ("normalizes characters", bool(proto.normalizer_spec.precompiled_charsmap)),
            ("removes extra spaces", proto.normalizer_spec.remove_extra_whitespaces),
            ("puts spaces behind words", proto.trainer_spec.treat_whitespace_as_suffix),
        )
        if there
    ]
    if found:
        raise UserError(
            f"the tokenizer {model} {' and '.join(found)}; exported are SentencePiece BPE models without "
            "normalization, as LLaMA 2's. Give --no-tokenizer to export the model without one"
        )


def _defined(proto: Any) -> list[str]:
    """The symbols that a user has defined, which are tokens wherever they stand in a text."""
    return [piece.piece for piece in proto.pieces if piece.type == proto.SentencePiece.USER_DEFINED]


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The pairs that SentencePiece merges, best first: it prefers the pair whose piece scores highest."""
    ranked = sorted(scores, key=lambda piece: -scores[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _compare(original: Any, directory: Path, model: Path, defined: list[str]) -> None:
    """UserError unless AutoTokenizer on `directory` gives the original's ids, also for `defined` symbols."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(directory))
    for text in (*PROBES, "".join(defined), "a".join(defined), " ".join(["", *defined, ""])):
        expected = original.encode(text)
        got = loaded(text, add_special_tokens=False)["input_ids"]
        if got != expected:
            raise UserError(
                f"transformers cannot reproduce the tokenizer {model}: {text!r} becomes {got}, and should "
                f"be {expected}. Give --no-tokenizer to export the model without one"
            )


def _copy(name: str, directory: Path) -> TokenizerFacts:
    from transformers import AutoTokenizer

    register_auto_classes()  # Or transformers asks whether to run the code in the directory of a DyT model.
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise UserError(
            f"the tokenizer {name} cannot be loaded ({describe(error)}). Give its place on this machine with "
            "--tokenizer-model, or --no-tokenizer to export the model without one"
        ) from error
    tokenizer.save_pretrained(str(directory))
    rows = 1 + max(tokenizer.get_vocab().values())  # more than its length where ids are left out
    return TokenizerFacts(rows, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
