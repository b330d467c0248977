"""Wrong input is named before training starts."""

import io
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.training import preflight
from tests.megatron_args import arguments as megatron_arguments


def arguments(**given: Any) -> Namespace:
    """Megatron's parsed arguments of a run for which nothing but `given` is to be looked at."""
    sizes = {"vocab_size": 64, "padded_vocab_size": 128, "split": "1,0,0", "save_interval": 10}
    return megatron_arguments(**sizes | {"skip_train": True, "transformer_impl": "local"} | given)


@pytest.fixture
def sentencepiece_model(tmp_path: Path) -> str:
    import sentencepiece

    model = io.BytesIO()
    lines = iter([f"line {number} of a small text" for number in range(50)])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=30, minloglevel=2
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return str(path)


def test_good_input_passes(dataset: str, sentencepiece_model: str, tmp_path: Path) -> None:
    save = str(tmp_path / "new" / "checkpoint")
    preflight.check(
        arguments(
            train_data_path=[dataset],
            valid_data_path=["1.0", dataset],
            tokenizer_type="SentencePieceTokenizer",
            tokenizer_model=sentencepiece_model,
            save=save,
            load=save,
        )
    )
    assert os.path.isdir(save)


def test_only_rank_0_touches_the_save_directory(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ranks of other nodes look at what is read, and may not tidy up beside it."""
    monkeypatch.setenv("RANK", "8")
    save = tmp_path / "checkpoint"
    given = arguments(data_path=[dataset], tokenizer_type="NullTokenizer", save=str(save), load=str(save))
    preflight.check_files(given)
    assert not save.exists()
    with pytest.raises(UserError, match=r"nowhere\.idx does not exist"):
        preflight.check_files(arguments(data_path=["nowhere"], tokenizer_type="NullTokenizer"))


def test_missing_halves_of_a_dataset(dataset: str) -> None:
    os.rename(f"{dataset}.bin", f"{dataset}.other")
    with pytest.raises(UserError, match=r"corpus\.bin does not exist"):
        preflight.check_data(arguments(data_path=["1", dataset]))
    with pytest.raises(UserError, match=r"nowhere\.idx does not exist"):
        preflight.check_data(arguments(data_path=["nowhere"]))


def test_ids_beyond_the_vocabulary(dataset: str) -> None:
    preflight.check_data(arguments(data_path=[dataset], padded_vocab_size=6))
    with pytest.raises(UserError, match=r"corpus has the id 5 \(token 4 of its file;"):
        preflight.check_data(arguments(data_path=[dataset], padded_vocab_size=5))


def test_no_data_at_all() -> None:
    with pytest.raises(UserError, match=r"no training data were given.*--mock-data"):
        preflight.check_data(arguments())
    preflight.check_data(arguments(mock_data=True))


def test_a_missing_list_of_data() -> None:
    with pytest.raises(UserError, match=r"data file list nowhere\.txt: no such file"):
        preflight.check_data(arguments(data_args_path="nowhere.txt"))


def test_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GPT2BPETokenizer needs --vocab-file FILE"):
        preflight.check_tokenizer(arguments())
    with pytest.raises(UserError, match="--tokenizer-model nowhere: no such file"):
        preflight.check_tokenizer(arguments(tokenizer_type="Llama2Tokenizer", tokenizer_model="nowhere"))
    broken = tmp_path / "tokenizer.model"
    broken.write_bytes(b"not a model")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        preflight.check_tokenizer(
            arguments(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(broken))
        )
    preflight.check_tokenizer(arguments(tokenizer_type="NullTokenizer"))


def test_save_directories_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make this directory"):
        preflight.check_save(arguments(save=str(tmp_path / "file")))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="no permission to write"):
        preflight.check_save(arguments(save=str(tmp_path)))


def test_loading_where_nothing_is(tmp_path: Path) -> None:
    empty = str(tmp_path)
    preflight.check_load(arguments(load=empty, save=empty))
    preflight.check_load(arguments())
    for flags in (
        {"load": empty},
        {"load": empty, "save": empty, "exit_on_missing_checkpoint": True},
        {"pretrained_checkpoint": empty},
    ):
        with pytest.raises(UserError, match="there is no checkpoint"):
            preflight.check_load(arguments(**flags))


def test_loading_a_step_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    for step, wanted in ((None, 3), (7, 7)):
        with pytest.raises(UserError, match=f"iter_000000{wanted} does not exist"):
            preflight.check_load(arguments(load=str(tmp_path), ckpt_step=step))


PREDICTION = {
    "save": "run",
    "mtp_num_layers": 1,
    "pipeline_model_parallel_size": 4,
    "untie_embeddings_and_output_weights": False,
    "pipeline_model_parallel_layout": None,
}


@pytest.mark.parametrize("layout", [None, "Et|tt|t|tmL"])
def test_prediction_in_the_last_stage_with_tied_embeddings_cannot_be_saved(layout: str | None) -> None:
    with pytest.raises(UserError, match="--untie-embeddings-and-output-weights"):
        preflight.check_tied_prediction(arguments(**PREDICTION | {"pipeline_model_parallel_layout": layout}))


@pytest.mark.parametrize(
    "other",
    [
        {"save": None},
        {"mtp_num_layers": None},
        {"pipeline_model_parallel_size": 1},
        {"untie_embeddings_and_output_weights": True},
        {"pipeline_model_parallel_layout": "Et|tt|tm|L"},
    ],
    ids=str,
)
def test_other_prediction_layers_can_be_saved(other: dict[str, Any]) -> None:
    preflight.check_tied_prediction(arguments(**PREDICTION | other))


def test_the_tokenizer_of_a_checkpoint_is_not_asked_for() -> None:
    args = arguments(use_checkpoint_args=True, use_tokenizer_model_from_checkpoint_args=True)
    preflight.check_tokenizer(args)
    args.use_tokenizer_model_from_checkpoint_args = False
    with pytest.raises(UserError, match="which was not given"):
        preflight.check_tokenizer(args)


def test_an_interval_that_cannot_be_divided_by() -> None:
    with pytest.raises(UserError, match="--eval-interval 0 is not a number of steps"):
        preflight.check_files(arguments(mock_data=True, tokenizer_type="NullTokenizer", eval_interval=0))
    for interval in (None, 1):
        preflight.check_evaluation(arguments(eval_interval=interval))


def test_saving_needs_an_interval(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --save-interval N"):
        preflight.check_save(arguments(save=str(tmp_path), save_interval=None))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("98,1,1", r"98,1,1 gives validation none of the 2 documents of .*corpus.*: --split 1,0,0"),
        ("9,1,0", r"validation none of .* --split 1,1,0, --split 1,0,0 for training"),
        (None, r"969, 30, 1 \(the default\) gives validation none"),
        ("1,1,0", None),
        ("1,0,0", None),
    ],
)
def test_a_part_of_the_split_without_a_document(dataset: str, split: str, message: str | None) -> None:
    args = arguments(data_path=[dataset], split=split)
    if message is None:
        preflight.check_data(args)
        return
    with pytest.raises(UserError, match=message):
        preflight.check_data(args)


def test_validation_data_gone_through_once_may_be_none(dataset: str) -> None:
    preflight.check_data(arguments(data_path=[dataset], split="98,1,0", full_validation=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"optimizer": "sgd"}, "--optimizer sgd with --load"),
        ({"optimizer": "sgd", "no_load_optim": True}, "schedule begins anew at step 7"),
        ({"no_load_optim": True}, "schedule begins anew at step 7"),
        ({"optimizer": "sgd", "finetune": True}, ""),
        ({"optimizer": "sgd", "skip_train": True}, ""),
        ({}, ""),
    ],
)
def test_what_becomes_of_the_optimizer_is_said_before_loading(
    given: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        preflight._check_optimizer(arguments(**({"skip_train": False} | given)), "7")
        said = capsys.readouterr().out
    except UserError as error:
        said = str(error)
    assert words in said
    assert bool(said) is bool(words)


def test_a_null_tokenizer_needs_its_size() -> None:
    with pytest.raises(UserError, match="--tokenizer-type NullTokenizer needs --vocab-size"):
        preflight.check_tokenizer(arguments(tokenizer_type="NullTokenizer", vocab_size=None))
