"""Training is refused with data that do not fit it, by the manifest beside them."""

from __future__ import annotations

import hashlib
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_dyt.data.dataset_manifest import HUGGING_FACE, check, tokenizer_file, tokenizer_sha256
from megatron_dyt.data.prepare import main
from megatron_dyt.data.train_tokenizer import train
from megatron_dyt.errors import UserError
from megatron_dyt.training import preflight

VOCABULARY = 290


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, t.model, and the dataset "train" made with it."""
    directory = tmp_path_factory.mktemp("made")
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {number} of a text"}) + "\n" for number in range(50)))
    (directory / "t.model").write_bytes(train([text], VOCABULARY))
    command = ["--input", str(text), "--tokenizer-model", str(directory / "t.model"), "--workers", "1"]
    main([*command, "--output-prefix", str(directory / "train")])
    return directory


@pytest.fixture
def data(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "data"))


def arguments(directory: Path, **given: Any) -> Namespace:
    flags = {
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": str(directory / "t.model"),
        "vocab_size": None,
        "padded_vocab_size": None,
    }
    return Namespace(**flags | given)


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"])
def test_data_and_their_tokenizer_pass(data: Path, kind: str) -> None:
    prefix = str(data / "train")
    check([prefix], arguments(data, tokenizer_type=kind))
    check([prefix], arguments(data, tokenizer_type="NullTokenizer", vocab_size=VOCABULARY))
    check([prefix], arguments(data, tokenizer_type=None, tokenizer_model=None, padded_vocab_size=VOCABULARY))


def test_renamed_data_and_tokenizer_pass(data: Path) -> None:
    for end in (".bin", ".idx", ".manifest.json"):
        (data / f"train{end}").rename(data / f"other.name{end}")
    model = (data / "t.model").rename(data / "u.model")
    check([str(data / "other.name")], arguments(data, tokenizer_model=str(model)))


def test_data_without_a_manifest_pass(data: Path) -> None:
    (data / "train.manifest.json").unlink()
    check([str(data / "train")], arguments(data, padded_vocab_size=1))


def other_tokenizer(data: Path) -> dict[str, Any]:
    (data / "u.model").write_bytes(train([data / "text.jsonl"], VOCABULARY - 5))
    return {"tokenizer_model": str(data / "u.model")}


def hugging_face(data: Path) -> dict[str, Any]:
    (data / "hf").mkdir()
    (data / "hf" / "tokenizer.json").write_text("{}")
    return {"tokenizer_type": HUGGING_FACE, "tokenizer_model": str(data / "hf")}


def cut(data: Path) -> dict[str, Any]:
    path = data / "train.bin"
    path.write_bytes(path.read_bytes()[:-2])
    return {}


def damage(data: Path) -> dict[str, Any]:
    (data / "train.manifest.json").write_text('{"format": 2')
    return {}


def old(data: Path) -> dict[str, Any]:
    (data / "train.manifest.json").write_text('{"made_from": {"format": 1}}')
    return {}


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (other_tokenizer, r"was made with the SentencePieceTokenizer .*t\.model .*u\.model is another one"),
        (hugging_face, r"was made with the SentencePieceTokenizer .*hf is another one"),
        (cut, r"train\.bin has \d+ bytes, but its manifest says \d+"),
        (damage, r"train\.manifest\.json is damaged, or of another version"),
        (old, r"train\.manifest\.json is damaged, or of another version"),
        (lambda data: {"padded_vocab_size": 289}, "vocabulary of 290 tokens, but --padded-vocab-size 289"),
        (
            lambda data: {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": 289},
            "vocabulary of 290 tokens, but --vocab-size 289",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    data: Path, spoil: Callable[[Path], dict[str, Any]], problem: str
) -> None:
    args = arguments(data, **spoil(data))
    with pytest.raises(UserError, match=problem):
        check([str(data / "train")], args)


def write_ends(directory: Path, bos: str, eos: str) -> None:
    names = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.fixture
def hub_data(data: Path) -> dict[str, Any]:
    """The dataset "ends", made with the Hugging Face tokenizer in "hf", and the flags for it."""
    (data / "hf").mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "<a>": 1, "<b>": 2, "<c>": 3}, "?"))
    tokenizer.add_special_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save(str(data / "hf" / "tokenizer.json"))
    write_ends(data / "hf", "<a>", "<b>")
    prepare(data)
    return {"tokenizer_type": HUGGING_FACE, "tokenizer_model": str(data / "hf")}


def prepare(data: Path) -> None:
    command = ["--input", str(data / "text.jsonl"), "--tokenizer-type", HUGGING_FACE, "--workers", "1"]
    main([*command, "--tokenizer-model", str(data / "hf"), "--output-prefix", str(data / "ends")])


def test_other_ends_of_a_hugging_face_tokenizer_are_named(data: Path, hub_data: dict[str, Any]) -> None:
    args = arguments(data, **hub_data)
    check([str(data / "ends")], args)
    write_ends(data / "hf", "<c>", "<b>")
    with pytest.raises(UserError, match=r"ends has BOS 1, but that of --tokenizer-model .*hf is 3"):
        check([str(data / "ends")], args)
    with pytest.raises(UserError, match=r"other settings \(tokenizer\)"):
        prepare(data)
    write_ends(data / "hf", "<a>", "<c>")
    with pytest.raises(UserError, match=r"ends has EOS 2, but that of .*hf is 3"):
        check([str(data / "ends")], args)
    # A tokenizer that cannot be loaded is Megatron's to complain of.
    check(
        [str(data / "ends")], arguments(data, **hub_data | {"tokenizer_model": f"{data}/hf/tokenizer.json"})
    )


def test_training_checks_it_for_every_data_set_of_a_blend(data: Path, made: Path) -> None:
    none = ("data_path", "data_args_path", "test_data_path", "per_split_data_args_path")
    args = arguments(data, **other_tokenizer(data), **dict.fromkeys((*none, "per_dataset_sequences_path")))
    args.mock_data = args.sft = False
    args.padded_vocab_size = 384
    args.train_data_path, args.valid_data_path = ["1", str(data / "train")], None
    (data / "train.manifest.json").unlink()
    preflight.check_data(args)
    args.train_data_path += ["2", str(made / "train")]
    with pytest.raises(UserError, match="is another one"):
        preflight.check_data(args)


def test_hugging_face_tokenizers_are_known_by_tokenizer_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    for name in (str(tmp_path), str(path)):
        assert tokenizer_sha256(HUGGING_FACE, name) == hashlib.sha256(b"{}").hexdigest()
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: None)
    assert tokenizer_sha256(HUGGING_FACE, "some/name") is None
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(path))
    assert tokenizer_file(HUGGING_FACE, "some/name") == path
