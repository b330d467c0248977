"""A model from a checkpoint alone: the same as the one that was saved, or a clear error."""

import dataclasses
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dyt.checkpoints.iterations import TRACKER
from megatron_dyt.checkpoints.saved_args import Checkpoint
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation import checkpoint_model
from megatron_dyt.evaluation.checkpoint_model import LoadedModel, load_model
from tests.license_tokenizer import write_tokenizer_model

from .conftest import SEQUENCE, VOCABULARY, Trained
from .toy import ToyTokenizer

Train = Callable[[str], Trained]


@pytest.mark.parametrize("norm", ["RMSNorm", "DyT"])
def test_loaded_model_is_the_saved_one(trained: Train, norm: str, fresh_megatron: None) -> None:
    saved = trained(norm)
    loaded = load_model(str(saved.directory))
    assert loaded.checkpoint.iteration == 4
    assert not loaded.model.training
    assert loaded.args.seq_length == SEQUENCE
    assert loaded.tokenizer.vocab_size == VOCABULARY

    ours, theirs = loaded.model.state_dict(), saved.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value is None or torch.equal(ours[name], value), name
    assert any("alpha" in name for name in ours) == (norm == "DyT")
    same_config(loaded.model.config, saved.model.config)
    # Not in the config, but in the model.
    for name in ("position_embedding_type", "share_embeddings_and_output_weights", "rotary_base"):
        assert getattr(loaded.model, name) == getattr(saved.model, name)
    frequencies = loaded.model.rotary_pos_emb.inv_freq
    assert torch.equal(frequencies, saved.model.rotary_pos_emb.inv_freq)
    assert "DyT model" in str(loaded) or norm != "DyT"


def same_config(ours: object, theirs: object) -> None:
    for field in dataclasses.fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        run_dependent = field.name in ("timers", "grad_scale_func", "finalize_model_grads_func")
        if run_dependent or field.name.endswith(("_func", "init_method")):
            continue
        assert mine == other, field.name
    assert getattr(ours, "dyt", None) == getattr(theirs, "dyt", None)


def test_earlier_iteration(trained: Train, fresh_megatron: None) -> None:
    saved = trained("DyT")
    loaded = load_model(str(saved.directory), ckpt_step=2)
    assert loaded.checkpoint.directory == saved.directory / "iter_0000002"
    weights = dict(loaded.model.named_parameters())
    last = dict(saved.model.named_parameters())
    assert any(not torch.equal(weights[name], last[name]) for name in last)


@pytest.fixture
def copy(trained: Train, tmp_path: Path) -> Path:
    return shutil.copytree(trained("RMSNorm").directory, tmp_path / "copy") / "iter_0000004"


@pytest.mark.parametrize("kept", [100, 60_000])
def test_damaged_checkpoint(copy: Path, fresh_megatron: None, kept: int) -> None:
    (data,) = copy.glob("*.distcp")
    with data.open("rb+") as file:
        file.truncate(kept)
    with pytest.raises(UserError, match=r"is truncated: \d+ of \d+ bytes|incomplete or damaged"):
        load_model(str(copy.parent))


def test_weights_that_cannot_be_read(
    trained: Train, fresh_megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training import checkpointing

    def fail(*_: object) -> None:
        # torch's own error: no Exception, and its message is a whole traceback.
        raise CheckpointException("load", {0: (OSError("bad sector"), StackSummary())})

    monkeypatch.setattr(checkpointing, "load_checkpoint", fail)
    with pytest.raises(UserError, match=r"cannot be read \(OSError: bad sector\)"):
        load_model(str(trained("DyT").directory))


def test_megatron_s_report_is_shown_when_it_fails(
    trained: Train,
    fresh_megatron: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = str(trained("DyT").directory)
    capsys.readouterr()

    def fail(_args: object) -> None:
        raise AssertionError("out of memory")

    monkeypatch.setattr(checkpoint_model, "build", fail)
    with pytest.raises(AssertionError, match="out of memory"):
        load_model(directory)
    assert "end of arguments" in capsys.readouterr().out


def test_checkpoint_without_arguments(
    trained: Train, fresh_megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import dist_checkpointing

    monkeypatch.setattr(dist_checkpointing, "load_common_state_dict", lambda _: {"iteration": 4})
    with pytest.raises(UserError, match="holds no arguments"):
        load_model(str(trained("DyT").directory))


def test_checkpoint_of_another_format(copy: Path, fresh_megatron: None) -> None:
    (copy / "metadata.json").unlink()
    with pytest.raises(UserError, match="not a torch_dist checkpoint"):
        load_model(str(copy.parent))


def test_checkpoint_of_the_other_norm(
    trained: Train, fresh_megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = checkpoint_model.model_flags
    monkeypatch.setattr(
        checkpoint_model, "model_flags", lambda saved: flags(saved) | {"normalization": "DyT"}
    )
    with pytest.raises(UserError, match="RMSNorm"):
        load_model(str(trained("RMSNorm").directory))


def test_padded_vocabulary_is_the_checkpoint_s(
    trained: Train, fresh_megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what Megatron would pad to at this tensor parallelism."""
    flags, multiple = checkpoint_model.model_flags, {"make_vocab_size_divisible_by": 1024}
    monkeypatch.setattr(checkpoint_model, "model_flags", lambda saved: flags(saved) | multiple)
    loaded = load_model(str(trained("DyT").directory))
    assert loaded.args.padded_vocab_size == 512
    assert loaded.tokenizer.vocab_size == VOCABULARY


def test_missing_tokenizer(trained: Train, fresh_megatron: None) -> None:
    with pytest.raises(UserError, match=r"nowhere.model.*--tokenizer-model"):
        load_model(str(trained("DyT").directory), tokenizer_model="nowhere.model")


def test_tokenizer_of_another_model(trained: Train, fresh_megatron: None, tmp_path: Path) -> None:
    small = write_tokenizer_model(tmp_path / "small.model", 350)
    with pytest.raises(UserError, match=r"small.model has 350 tokens, too few for the 512"):
        load_model(str(trained("DyT").directory), tokenizer_model=str(small))


def test_hybrid_model(trained: Train, fresh_megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(str(trained("RMSNorm").directory))
    monkeypatch.setattr(loaded.args, "hybrid_layer_pattern", "M*")
    with pytest.raises(UserError, match="hybrid"):
        checkpoint_model.build(loaded.args)


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        # Megatron would load it whatever --ckpt-step says.
        ("release", r"names a release.*--ckpt-step.*Write 4 into it"),
        # Megatron would exit with code 0.
        ("", r"holds ''; it must hold the number.*there: 2, 4"),
    ],
    ids=["release", "damaged"],
)
def test_a_tracker_without_an_iteration_is_an_error_with_a_step_too(
    copy: Path, fresh_megatron: None, tracker: str, message: str
) -> None:
    (copy.parent / TRACKER).write_text(tracker)
    with pytest.raises(UserError, match=message):
        load_model(str(copy.parent), ckpt_step=4)


# --- what results on disk are known by ------------------------------------------------------------


def identity(directory: Path, path: str | None, tokenizer: ToyTokenizer, **args: object) -> dict[str, object]:
    checkpoint = Checkpoint(directory.parent, 4, directory)
    saved = Namespace(tokenizer_model=path, **args)
    return LoadedModel(torch.nn.Identity(), tokenizer, saved, checkpoint, 1).identity()


def test_identity_is_of_weights_tokenizer_and_precision(trained: Train, tmp_path: Path) -> None:
    directory = trained("DyT").directory / "iter_0000004"
    one, same, other = (str(tmp_path / name) for name in ("one", "same", "other"))
    for path, content in ((one, b"1"), (same, b"1"), (other, b"2")):
        Path(path).write_bytes(content)
    kind = {"tokenizer_type": "SentencePieceTokenizer"}
    first = identity(directory, one, ToyTokenizer(), bf16=False, **kind)
    assert first == identity(directory, same, ToyTokenizer(), bf16=False, **kind)
    assert first != identity(directory, other, ToyTokenizer(), bf16=False, **kind)
    assert first != identity(directory, one, ToyTokenizer(), bf16=True, **kind)
    assert first != identity(directory.with_name("iter_0000002"), one, ToyTokenizer(), bf16=False, **kind)
    assert identity(directory, None, ToyTokenizer(), **kind)["tokenizer"] is None


def test_identity_is_of_what_the_tokenizer_s_file_does_not_say(trained: Train) -> None:
    """Where an answer ends and how large the vocabulary is, which may be in other files or have no hash."""
    directory, tokenizer = trained("DyT").directory / "iter_0000004", ToyTokenizer()
    first = identity(directory, "name", tokenizer, tokenizer_type="TikTokenizer")
    tokenizer.eod = 5
    second = identity(directory, "name", tokenizer, tokenizer_type="TikTokenizer")
    tokenizer.vocab_size += 1
    assert first != second != identity(directory, "name", tokenizer, tokenizer_type="TikTokenizer")
