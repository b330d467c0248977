"""How a training process ends."""

import errno
import logging
import os
import shutil
import signal
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dyt.training import launch

WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Megatron's run saves here, and was saving iteration 4 when it ended."""
    state = ModuleType("megatron.training.global_vars")
    state._GLOBAL_ARGS = Namespace(save=str(tmp_path))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, state.__name__, state)
    (tmp_path / "iter_0000004").mkdir()
    return tmp_path


def test_a_lone_process_gets_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    launch.prepare_process()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    torch.distributed.destroy_process_group()


def test_torchruns_address_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    launch.prepare_process()
    assert "MASTER_PORT" not in os.environ


def test_success_ends_the_process_group() -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with launch.clean_end():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert not torch.distributed.is_initialized()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_sigterm_says_so_and_clears_the_interrupted_save(
    save: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped, launch.clean_end():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    printed = capsys.readouterr()
    assert "removed the incomplete checkpoint" in printed.out
    assert printed.err.endswith("terminated by SIGTERM; the last complete checkpoint is intact\n")
    assert list(save.iterdir()) == []


def test_ctrl_c_stays_one_when_pytorch_wraps_it(save: Path) -> None:
    def interrupted_save() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt as interrupt:
            raise CheckpointException("write", {}) from interrupt

    with pytest.raises(KeyboardInterrupt), launch.clean_end():
        interrupted_save()
    assert list(save.iterdir()) == []


def test_a_second_signal_does_not_stop_the_clearing(save: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tidy = launch.iterations.tidy

    def tidy_interrupted(directory: str) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return tidy(directory)

    monkeypatch.setattr(launch.iterations, "tidy", tidy_interrupted)
    with pytest.raises(SystemExit) as stopped, launch.clean_end():
        raise RuntimeError("a data loader worker was terminated")
    assert stopped.value.code == 143
    assert list(save.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "code"), [(1000, errno.ENOSPC), (10**12, errno.EIO)], ids=["full", "not full"]
)
def test_a_failed_save_says_why(save: Path, monkeypatch: pytest.MonkeyPatch, free: int, code: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free))

    def failed_save() -> None:
        logging.getLogger(WRITER).error("unexpected pos 704")
        raise CheckpointException("write", {})

    with pytest.raises(OSError, match="unexpected pos 704") as failure, launch.clean_end():
        failed_save()
    assert failure.value.errno == code
    assert failure.value.filename == str(save)


def test_other_errors_pass(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), launch.clean_end():
        raise ZeroDivisionError
    assert capsys.readouterr().err == ""
