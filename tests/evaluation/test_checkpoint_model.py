"""A model from a checkpoint alone: the same as the one that was saved, or a clear error."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dyt.checkpoints.saved_args import TRACKER, find_checkpoint
from megatron_dyt.data import train_tokenizer
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation import checkpoint_model
from megatron_dyt.evaluation.checkpoint_model import load_model

from .conftest import SEQUENCE, TEXT, VOCABULARY, Trained

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


def test_find_checkpoint(trained: Train, tmp_path: Path) -> None:
    directory = trained("RMSNorm").directory
    assert find_checkpoint(str(directory)).directory == directory / "iter_0000004"
    wrong = {
        "no such directory": (directory / "nowhere", None),
        "missing. Give the directory": (tmp_path, None),
        f"Give --load {directory} --ckpt-step 2": (directory / "iter_0000002", None),
        "found: 2, 4": (directory, 3),
    }
    for message, (load, step) in wrong.items():
        with pytest.raises(UserError, match=re.escape(message)):
            find_checkpoint(str(load), step)


def test_find_checkpoint_with_a_bad_tracker(tmp_path: Path) -> None:
    (tmp_path / "iter_0000007").mkdir()
    with pytest.raises(UserError, match="with --ckpt-step: 7"):
        find_checkpoint(str(tmp_path))
    (tmp_path / TRACKER).write_text("half")
    with pytest.raises(UserError, match=r"'half'.*found: 7"):
        find_checkpoint(str(tmp_path))
    (tmp_path / TRACKER).write_text("8")
    with pytest.raises(UserError, match="iteration 8 is not there; found: 7"):
        find_checkpoint(str(tmp_path))


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
    text, small = tmp_path / "text.jsonl", tmp_path / "small.model"
    text.write_text(json.dumps({"text": TEXT[:3000]}) + "\n")
    small.write_bytes(train_tokenizer.train([text], 350, max_bytes=10**6))
    with pytest.raises(UserError, match=r"small.model has 350 tokens, too few for the 512"):
        load_model(str(trained("DyT").directory), tokenizer_model=str(small))


def test_layout_that_does_not_fit(trained: Train, fresh_megatron: None) -> None:
    with pytest.raises(UserError, match=r"size 2 does not divide the 1 processes; allowed here: 1\."):
        load_model(str(trained("DyT").directory), tensor_parallel=2)


def test_hybrid_model(trained: Train, fresh_megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(str(trained("RMSNorm").directory))
    monkeypatch.setattr(loaded.args, "hybrid_layer_pattern", "M*")
    with pytest.raises(UserError, match="hybrid"):
        checkpoint_model.build(loaded.args)
