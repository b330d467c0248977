"""`megatron-dyt COMMAND`: the one door to everything but training, which torchrun starts.

A command is a click command in a module of this folder that imports what does the work only when it is
called, so that `--help` needs no torch. Under torchrun: `torchrun ... -m megatron_dyt COMMAND`.
"""

import importlib
import sys
from typing import Any, NamedTuple

import click

from megatron_dyt.errors import UserError, run_main


class Command(NamedTuple):
    """Where it is, in a module of this folder, and what it does; which extras of pyproject.toml it needs."""

    place: str
    what: str
    extras: str = ""


COMMANDS = {
    "recipe": Command("recipes:recipe", "a LLaMA size and how it is trained, as text or as flags"),
    "plan": Command("recipes:plan", "parallel layout, memory and days of a recipe on a cluster", "train"),
    "dry-run": Command(
        "recipes:dry_run", "try a launch's flags under a simulated world, without GPUs", "train"
    ),
    "prepare-data": Command("data:prepare_data", "tokenize text into Megatron's indexed data sets", "train"),
    "train-tokenizer": Command("data:train_tokenizer", "make a SentencePiece tokenizer", "train"),
    "eval": Command("evaluation:evaluate", "zero-shot evaluation of a checkpoint with lm-eval", "eval"),
    "eval-data": Command(
        "evaluation:export_data", "fetch the tasks' data for machines without network", "eval"
    ),
    "export": Command("hf:export_command", "a checkpoint as a Hugging Face model", "hf,train"),
    "import": Command("hf:import_command", "a Hugging Face LLaMA as a Megatron checkpoint", "hf,train"),
    "convert": Command(
        "hf:convert_command", "a Hugging Face LLaMA as one with DyT (experimental)", "hf,train"
    ),
    "report": Command("report:report", "compare runs: results.json and report.html", "report"),
    "follow": Command("report:follow", "show the progress of a run", "report"),
    "sweep": Command(
        "sweep:sweep", "train the runs of a grid, several at a time, and compare them", "report,train"
    ),
    "probe": Command(
        "probe:probe", "what the norms of a model do to their input, as figures", "report,train"
    ),
}


class _Lazy(click.Group):
    """A group that knows its commands' names and one-line help, and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].place.split(":")
        command = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        ctx.invoked_subcommand = args[0]  # `invoke` wants it, also when the command's module fails.
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            name, package = ctx.invoked_subcommand or "", (error.name or "").split(".")[0]
            extras = COMMANDS[name].extras if name in COMMANDS else ""
            if not extras or package == "megatron_dyt":
                raise
            raise UserError(
                f"megatron-dyt {name} needs {package}: pip install 'megatron-dyt[{extras}]'"
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.what) for name, command in COMMANDS.items()])


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="megatron-dyt")
def main() -> None:
    """Dynamic Tanh for Megatron-Core: recipes, data, evaluation, export and reports.

    Training is started by torchrun: torchrun ... -m megatron_dyt.pretrain ARGS, or -m megatron_dyt.run FILE.
    """


def entry() -> None:
    """The console script. A `UserError` of a command ends in one line and exit code 2."""
    run_main(_run)


def _run() -> int | None:
    """Run the command line; not by click's own `main`, which keeps Ctrl-C and broken pipes to itself."""
    try:
        with main.make_context("megatron-dyt", sys.argv[1:]) as context:
            code: int | None = main.invoke(context)
            return code
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
