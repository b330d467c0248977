"""The command line's table: each command exists and is handed its arguments."""

import importlib.util
import sys

import pytest

from megatron_dyt import cli
from megatron_dyt.errors import UserError


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_module(name: str) -> None:
    assert importlib.util.find_spec(cli.COMMANDS[name][0]) is not None


def test_help_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-dyt"])
    cli.main()
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_a_command_gets_its_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-dyt", "plan", "--model", "7b", "--nodes", "8"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "LLaMA 7b" in capsys.readouterr().out


def test_an_unknown_command_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["megatron-dyt", "train"])
    with pytest.raises(UserError, match="no command 'train'; there are recipe, plan, dry-run"):
        cli.main()
