"""Tokenizer, data and checkpoint that do not belong together are refused, as far as files tell."""

import hashlib
import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from megatron_dyt.atomic import sha256
from megatron_dyt.data.dataset_manifest import HUGGING_FACE, DatasetManifest
from megatron_dyt.data.tokenizer_check import (
    check_against_data,
    check_data,
    check_vocabulary,
    documents_begin_with_bos,
)
from megatron_dyt.data.tokenizers import tokenizer_file, tokenizer_sha256
from megatron_dyt.data.train_tokenizer import train
from megatron_dyt.errors import UserError
from megatron_dyt.training import preflight
from tests.data.samples import manifest, prepare

VOCABULARY = 290


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, t.model, and the dataset "train" made with it."""
    directory = tmp_path_factory.mktemp("made")
    text = directory / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"line {number} of a text"}) + "\n" for number in range(50)))
    (directory / "t.model").write_bytes(train([text], VOCABULARY))
    command = ["--input", text, "--tokenizer-model", directory / "t.model", "--workers", 1]
    prepare(*command, "--output-prefix", directory / "train")
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
    check_data([prefix], arguments(data, tokenizer_type=kind))
    check_data([prefix], arguments(data, tokenizer_type="NullTokenizer", vocab_size=VOCABULARY))
    check_data(
        [prefix], arguments(data, tokenizer_type=None, tokenizer_model=None, padded_vocab_size=VOCABULARY)
    )


def test_renamed_data_and_tokenizer_pass(data: Path) -> None:
    for end in (".bin", ".idx", ".manifest.json"):
        (data / f"train{end}").rename(data / f"other.name{end}")
    model = (data / "t.model").rename(data / "u.model")
    check_data([str(data / "other.name")], arguments(data, tokenizer_model=str(model)))


def test_data_without_a_manifest_pass(data: Path) -> None:
    (data / "train.manifest.json").unlink()
    check_data([str(data / "train")], arguments(data, padded_vocab_size=1))


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
        check_data([str(data / "train")], args)


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
    prepare_ends(data)
    return {"tokenizer_type": HUGGING_FACE, "tokenizer_model": str(data / "hf")}


def prepare_ends(data: Path) -> None:
    command = ["--input", data / "text.jsonl", "--tokenizer-type", HUGGING_FACE, "--workers", 1]
    prepare(*command, "--tokenizer-model", data / "hf", "--output-prefix", data / "ends")


def test_other_ends_of_a_hugging_face_tokenizer_are_named(data: Path, hub_data: dict[str, Any]) -> None:
    args = arguments(data, **hub_data)
    check_data([str(data / "ends")], args)
    write_ends(data / "hf", "<c>", "<b>")
    with pytest.raises(UserError, match=r"ends has BOS 1, but that of --tokenizer-model .*hf is 3"):
        check_data([str(data / "ends")], args)
    with pytest.raises(UserError, match=r"other settings \(tokenizer\)"):
        prepare_ends(data)
    write_ends(data / "hf", "<a>", "<c>")
    with pytest.raises(UserError, match=r"ends has EOS 2, but that of .*hf is 3"):
        check_data([str(data / "ends")], args)
    # A tokenizer that cannot be loaded is Megatron's to complain of.
    check_data(
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


# --- the tokenizer of a checkpoint ------------------------------------------------------------------------

SAVED = Namespace(
    padded_vocab_size=512,
    make_vocab_size_divisible_by=128,
    tensor_model_parallel_size=1,
    tokenizer_model="its.model",
)
HERE = Path("checkpoint")
KIND = "SentencePieceTokenizer"


def test_sizes_that_padding_explains() -> None:
    for size in (385, 400, 512):
        check_vocabulary(size, SAVED, "other.model", HERE)
    check_vocabulary(129, Namespace(**vars(SAVED) | {"tensor_model_parallel_size": 4}), "other.model", HERE)


def test_too_many_tokens() -> None:
    with pytest.raises(UserError, match=r"other.model has 513 tokens.*checkpoint knows at most 512"):
        check_vocabulary(513, SAVED, "other.model", HERE)


def test_too_few_tokens() -> None:
    with pytest.raises(UserError, match=r"384 tokens, too few for the 512.*multiple of 128"):
        check_vocabulary(384, SAVED, "other.model", HERE)
    # The checkpoint's own may be padded by hand.
    check_vocabulary(384, SAVED, "its.model", HERE)


def test_data_of_another_tokenizer(tmp_path: Path) -> None:
    own, other = tmp_path / "own.model", tmp_path / "other.model"
    own.write_bytes(b"one")
    other.write_bytes(b"another")
    manifest(sha256(own)).write(tmp_path / "train")
    for flag in ("data_path", "train_data_path"):
        saved = Namespace(
            tokenizer_type=KIND, **{flag: ["0.7", str(tmp_path / "train"), "0.3", str(tmp_path / "gone")]}
        )
        check_against_data(saved, str(own))
        with pytest.raises(UserError, match=r"other.model .*says .*train.manifest.json"):
            check_against_data(saved, str(other))


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"made_from": {"tokenizer": {}}}', '{"made_from": 3}'])
def test_nothing_is_known(tmp_path: Path, manifest: str) -> None:
    model = tmp_path / "own.model"
    model.write_bytes(b"one")
    (tmp_path / "train.manifest.json").write_text(manifest)
    check_against_data(Namespace(tokenizer_type=KIND, data_path=[str(tmp_path / "train")]), str(model))
    check_against_data(Namespace(tokenizer_type=KIND, data_path=None), str(model))
    check_against_data(Namespace(tokenizer_type="NullTokenizer"), str(model))
    check_against_data(Namespace(), None)


def test_data_that_may_not_be_read_are_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(prefix: Path) -> None:
        raise PermissionError(13, "Permission denied", str(prefix))

    monkeypatch.setattr(DatasetManifest, "read", refuse)
    assert documents_begin_with_bos(Namespace(data_path=["/private/train"])) is None


def test_whether_documents_begin_with_bos(tmp_path: Path) -> None:
    for name, bos in {"with": True, "without": False}.items():
        manifest(bos=bos).write(tmp_path / name)
    (tmp_path / "other.manifest.json").write_text("{}")

    def answer(*names: str) -> bool | None:
        words = [word for name in names for word in ("1", str(tmp_path / name))]
        return documents_begin_with_bos(Namespace(data_path=words, valid_data_path=None))

    assert answer("with", "other") is True
    assert answer("without", "gone") is False
    # With BOS in some of the documents the model knows it.
    assert answer("without", "with") is True
    assert answer("other") is answer("gone") is answer() is None
