"""The one door: its commands exist, are handed their arguments, and end as errors.run_main says."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from megatron_dyt import cli
from megatron_dyt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there(name: str) -> None:
    assert isinstance(cli.main.get_command(click.Context(cli.main), name), click.Command)


def test_help_lists_the_commands() -> None:
    text = CliRunner().invoke(cli.main, ["--help"]).output
    assert all(name in text for name in cli.COMMANDS)


def test_an_unknown_command_is_refused() -> None:
    result = CliRunner().invoke(cli.main, ["train"])
    assert result.exit_code == 2
    assert "No such command 'train'" in result.output


def stand_in(command: click.Command, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`megatron-dyt NAME` is `command`, of this file in place of a module of the folder."""
    monkeypatch.setitem(sys.modules, f"{cli.__name__}.{__name__}", sys.modules[__name__])
    assert command.callback is not None
    row = cli.Command(f"{__name__}:{command.callback.__name__}", "", "eval")
    monkeypatch.setitem(cli.COMMANDS, name, row)


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
    for command in (interrupted, refused):
        stand_in(command, str(command.name), monkeypatch)
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
    commands = [["--help"], *([name, "--help"] for name in cli.COMMANDS)]
    commands += [["recipe", "7b"], ["plan", "--model", "70b", "--nodes", "128"]]
    script = WITHOUT_TORCH.format(commands=commands)
    subprocess.run([sys.executable, "-c", script], check=True)


@click.command()
def needs_a_package() -> None:
    importlib.import_module("package_of_an_extra.part")


@click.command()
def needs_a_file() -> None:
    importlib.import_module("megatron_dyt.not_there")


@pytest.mark.parametrize("when", ["called", "imported"])
def test_a_missing_extra_is_named(when: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(needs_a_package, "eval", monkeypatch)
    if when == "imported":
        (tmp_path / "a_command.py").write_text("import package_of_an_extra.part")
        monkeypatch.setattr(cli, "__path__", [str(tmp_path)])
        monkeypatch.setitem(cli.COMMANDS, "eval", cli.Command("a_command:main", "", "eval"))
    error = CliRunner().invoke(cli.main, ["eval"]).exception
    assert isinstance(error, UserError)
    assert str(error) == "megatron-dyt eval needs package_of_an_extra: pip install 'megatron-dyt[eval]'"


def test_a_module_missing_from_the_wheel_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(needs_a_file, "eval", monkeypatch)
    assert isinstance(CliRunner().invoke(cli.main, ["eval"]).exception, ModuleNotFoundError)


def test_extras_are_those_of_the_metadata() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for command in cli.COMMANDS.values() for extra in command.extras.split(",")}
    assert named <= {"", *declared}
