"""Complete, interrupted and damaged checkpoints in a --save directory."""

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_dyt.checkpoints import iterations
from megatron_dyt.checkpoints.iterations import TRACKER
from megatron_dyt.errors import UserError


def complete(root: Path, iteration: int) -> Path:
    """A checkpoint with the files of Megatron's torch_dist format, and the tracker on it."""
    path = root / f"iter_{iteration:07d}"
    dcp.save({"weight": torch.arange(1000)}, checkpoint_id=path, no_dist=True)
    (path / "metadata.json").write_text("{}")
    (root / TRACKER).write_text(str(iteration))
    return path


def interrupted(root: Path, iteration: int) -> Path:
    path = root / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"half")
    return path


def test_only_what_an_interrupted_save_left_is_removed(tmp_path: Path) -> None:
    good, half = complete(tmp_path, 2), interrupted(tmp_path, 4)
    legacy = tmp_path / "iter_0000003" / "mp_rank_00"
    legacy.mkdir(parents=True)
    empty = tmp_path / "iter_0000005"
    empty.mkdir()
    assert iterations.tidy(tmp_path) == [
        f"removed the incomplete checkpoint {half}",
        f"removed the incomplete checkpoint {empty}",
    ]
    assert good.exists()
    assert legacy.exists()
    assert iterations.last_iteration(tmp_path) == "2"
    assert iterations.tidy(tmp_path) == []


def test_what_cannot_be_read_just_now_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = complete(tmp_path, 2)
    complete(tmp_path, 4)

    def fail(path: Path, *_: object, **__: object) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_text", fail)
        broken.setattr(Path, "read_bytes", fail)
        broken.setattr(iterations, "_tracker_text", lambda root: "4")
        assert iterations.tidy(tmp_path) == []
    assert good.exists()


def test_checkpoints_of_other_formats_are_complete_without_metadata_json(tmp_path: Path) -> None:
    # torch_dcp and fsdp_dtensor write .metadata and data files only; torch_dist also common.pt, first.
    path = tmp_path / "iter_0000002"
    dcp.save({"weight": torch.arange(1000)}, checkpoint_id=path, no_dist=True)
    half = tmp_path / "iter_0000004"
    dcp.save({"weight": torch.arange(1000)}, checkpoint_id=half, no_dist=True)
    (half / "common.pt").write_bytes(b"x")
    (tmp_path / TRACKER).write_text("2")
    assert iterations.tidy(tmp_path) == [f"removed the incomplete checkpoint {half}"]
    assert path.exists()
    iterations.check_readable(tmp_path, "2")


def test_what_the_tracker_names_is_never_removed(tmp_path: Path) -> None:
    damaged = complete(tmp_path, 2)
    (damaged / "metadata.json").unlink()
    (damaged / "common.pt").write_bytes(b"x")
    assert iterations.tidy(tmp_path) == []
    assert damaged.exists()


def test_an_empty_tracker_names_the_last_complete_checkpoint_again(tmp_path: Path) -> None:
    complete(tmp_path, 2)
    complete(tmp_path, 4)
    (tmp_path / TRACKER).write_text("")
    with pytest.raises(UserError, match="complete checkpoint; there: 2, 4"):
        iterations.last_iteration(tmp_path)
    (line,) = iterations.tidy(tmp_path)
    assert line.endswith("to 4, the last complete checkpoint")
    assert iterations.last_iteration(tmp_path) == "4"


def test_names(tmp_path: Path) -> None:
    assert iterations.last_iteration(tmp_path) is None
    assert iterations.iteration_directory(tmp_path, "30").name == "iter_0000030"
    assert iterations.iteration_directory(tmp_path, "release").name == "release"


@pytest.mark.parametrize(
    ("tracker", "step", "loaded"),
    [("4", None, "4"), ("4", 2, "2"), (None, 2, "2"), (None, None, None), ("release", 2, "release")],
)
def test_what_megatron_loads(
    tmp_path: Path, tracker: str | None, step: int | None, loaded: str | None
) -> None:
    """A step comes before the tracker's, but not before a release."""
    if tracker is not None:
        (tmp_path / TRACKER).write_text(tracker)
    assert iterations.iteration_to_load(tmp_path, step) == loaded


def test_a_whole_checkpoint_is_readable(tmp_path: Path) -> None:
    complete(tmp_path, 2)
    iterations.check_readable(tmp_path, "2")


def test_a_missing_iteration_lists_the_others(tmp_path: Path) -> None:
    complete(tmp_path, 2)
    with pytest.raises(UserError, match=r"iter_0000009 does not exist; complete.*: 2"):
        iterations.check_readable(tmp_path, "9")


def test_damage_is_named(tmp_path: Path) -> None:
    path = complete(tmp_path, 2)
    (data,) = path.glob("*.distcp")
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"{data.name} is truncated: {len(whole) // 2} of"):
        iterations.check_readable(tmp_path, "2")
    data.rename(path / "__9_0.distcp")
    with pytest.raises(UserError, match=rf"{data.name} is missing"):
        iterations.check_readable(tmp_path, "2")
    (path / ".metadata").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"metadata of checkpoint .* cannot be read"):
        iterations.check_readable(tmp_path, "2")
    (path / ".metadata").unlink()
    with pytest.raises(UserError, match="is incomplete: it has no metadata"):
        iterations.check_readable(tmp_path, "2")


def test_other_formats_are_left_to_megatron(tmp_path: Path) -> None:
    (tmp_path / "iter_0000003" / "mp_rank_00").mkdir(parents=True)
    iterations.check_readable(tmp_path, "3")
