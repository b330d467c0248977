"""A directory that is written is complete or absent."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dyt.errors import UserError
from megatron_dyt.hf.directory import check_free, check_space, size_in_bytes, whole_directory, write_tensors


def test_takes_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    left = tmp_path / "a" / "out.partial"
    left.mkdir(parents=True)
    (left / "old").touch()
    with whole_directory(target) as directory:
        assert list(directory.iterdir()) == []
        (directory / "new").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert not left.exists()


def test_tensors_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "out") as directory:
        write_tensors(directory, {"x": torch.zeros(3)}, lambda _: iter([{"x": torch.zeros(3)}]), 100)
        save_file({"x": torch.zeros(3)}, directory / "of the library.safetensors")
        (directory / "other").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


def test_a_file_that_cannot_be_written_raises_the_system_s_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors") as caught:
            write_tensors(tmp_path, {"x": torch.zeros(999)}, lambda _: iter([{"x": torch.zeros(999)}]), 10**4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


def test_files_are_those_of_the_library(tmp_path: Path) -> None:
    """Parts come in any order, and the library reads them; odd sizes move what stands behind them."""
    tensors = {
        "a": torch.arange(3, dtype=torch.bfloat16),
        "b": torch.arange(10.0).reshape(2, 5),
        "c": torch.arange(7, dtype=torch.float16),
    }
    planned = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write_tensors(tmp_path, planned, lambda names: ({name: tensors[name]} for name in reversed(names)), 50)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_tensor_that_is_not_as_planned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x: torch.Size\(\[4\]\) torch.float32 was made, not"):
        write_tensors(tmp_path, {"x": torch.zeros(3)}, lambda _: iter([{"x": torch.zeros(4)}]), 100)


def test_fails_without_a_trace(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_directory(tmp_path / "out") as directory:
            (directory / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_may_be_replaced(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    check_free("--output", empty)
    with whole_directory(empty) as directory:
        (directory / "new").touch()
    with pytest.raises(UserError, match="not empty"):
        check_free("--output", empty)
    with pytest.raises(UserError, match="exists; give a new directory"):
        check_free("--output", empty / "new")
    check_free("--output", tmp_path / "none")


@pytest.mark.parametrize("what", ["link", "mount", "."])
def test_what_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mount").mkdir()
    Path("link").symlink_to("mount")
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == "mount")
    with pytest.raises(UserError, match=r"--output .* cannot replace; give a new directory inside it"):
        check_free("--output", Path(what))
    check_free("--output", Path(what) / "new")


def test_space(tmp_path: Path) -> None:
    check_space("--output", tmp_path / "deep" / "er", 1)
    with pytest.raises(UserError, match="GB are needed"):
        check_space("--output", tmp_path / "deep" / "er", 10**18)


def test_size() -> None:
    assert [size_in_bytes(text) for text in ("5GB", "500 mb", "12")] == [5 * 10**9, 500 * 10**6, 12]
    for wrong in ("5GiB", "0GB", "-1", "big"):
        with pytest.raises(ValueError, match="give a size such as"):
            size_in_bytes(wrong)
