"""Which checkpoint of a directory is meant, by one reading of the tracker."""

from pathlib import Path

import pytest

from megatron_dyt.checkpoints.iterations import TRACKER
from megatron_dyt.checkpoints.saved_args import find_checkpoint
from megatron_dyt.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with the complete checkpoints 2 and 4; the tracker names the last."""
    for iteration in (2, 4):
        path = tmp_path / f"iter_{iteration:07d}"
        path.mkdir()
        (path / "metadata.json").write_text("{}")
    (tmp_path / TRACKER).write_text("4\n")
    return tmp_path


def test_the_latest_or_the_one_that_is_asked_for(root: Path) -> None:
    assert find_checkpoint(str(root)).directory == root / "iter_0000004"
    assert find_checkpoint(str(root), 2).directory == root / "iter_0000002"
    assert find_checkpoint(str(root)).iteration == 4


@pytest.mark.parametrize(
    ("tracker", "load", "step", "message"),
    [
        ("4", "nowhere", None, "no such directory. Give the directory that training saved to"),
        ("4", "", 3, "iteration 3 is not there; found: 2, 4. Choose one of them with --ckpt-step"),
        ("8", "", None, "iteration 8 is not there; found: 2, 4"),
        ("4", "iter_0000002", None, r"one iteration of a checkpoint: give .* and --ckpt-step 2"),
        (None, "", None, "Choose one of its iterations with --ckpt-step: 2, 4"),
        ("", "", None, "holds ''; it must hold the number of an iteration.*there: 2, 4"),
        ("half", "", None, "holds 'half'; it must hold the number"),
        (b"\xff\x00", "", None, "must hold the number"),
        ("release", "", None, "names a release.*--ckpt-step; found: 2, 4"),
    ],
)
def test_what_is_no_checkpoint(
    root: Path, tracker: str | bytes | None, load: str, step: int | None, message: str
) -> None:
    if tracker is None:
        (root / TRACKER).unlink()
    else:
        (root / TRACKER).write_bytes(tracker if isinstance(tracker, bytes) else tracker.encode())
    with pytest.raises(UserError, match=message):
        find_checkpoint(str(root / load), step)


def test_a_directory_without_any_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no checkpoint .*Give the directory that training saved"):
        find_checkpoint(str(tmp_path))
