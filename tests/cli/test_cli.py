"""The one door: its commands exist, are handed their arguments, and end as errors.run_main says."""

import importlib.util
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from megatron_dyt import cli
from megatron_dyt.errors import UserError


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


@click.command()
def interrupted() -> None:
    raise KeyboardInterrupt


@click.command()
def refused() -> None:
    raise UserError("given; allowed; to do")


@pytest.mark.parametrize(
    ("words", "code"),
    [(["interrupted"], 130), (["refused"], 2), (["refused", "--no-such"], 2), (["--version"], 0), ([], 2)],
    ids=lambda given: " ".join(given) if isinstance(given, list) else str(given),
)
def test_a_command_ends_as_run_main_says(
    words: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("interrupted", "refused"):
        monkeypatch.setitem(cli.COMMANDS, command, (f"{__name__}:{command}", ""))
    monkeypatch.setattr("sys.argv", ["megatron-dyt", *words])
    with pytest.raises(SystemExit) as end:
        cli.entry()
    assert end.value.code == code


WITHOUT_TORCH = """
import sys
from click.testing import CliRunner
from megatron_dyt import cli
for words in {commands!r}:
    result = CliRunner().invoke(cli.main, words)
    assert result.exit_code == 0, (words, result.output, result.exception)
    heavy = {{"torch", "megatron.core"}} & sys.modules.keys()
    assert not heavy, (words, heavy)
"""


def test_help_recipes_and_plans_import_no_torch() -> None:
    """Their start takes a tenth of a second instead of seconds."""
    own = [name for name, (where, _) in cli.COMMANDS.items() if ":" in where]
    commands = [["--help"], *([name, "--help"] for name in own)]
    commands += [["recipe", "7b"], ["plan", "--model", "70b", "--nodes", "128"], ["scaling"]]
    script = WITHOUT_TORCH.format(commands=commands)
    subprocess.run([sys.executable, "-c", script], check=True)
