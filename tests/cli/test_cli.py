"""The one door: its commands exist, are handed their arguments, and end as errors.run_main says."""

import importlib.util

import click
import pytest
from click.testing import CliRunner

from megatron_dyt import cli


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there(name: str) -> None:
    module, attribute = cli.COMMANDS[name][0].partition(":")[::2]
    assert importlib.util.find_spec(module) is not None
    if attribute:
        assert isinstance(getattr(importlib.import_module(module), attribute), click.Command)


def test_help_lists_the_commands() -> None:
    text = CliRunner().invoke(cli.main, ["--help"]).output
    assert all(name in text for name in cli.COMMANDS)


def test_an_unknown_command_is_refused() -> None:
    result = CliRunner().invoke(cli.main, ["train"])
    assert result.exit_code == 2
    assert "No such command 'train'" in result.output
