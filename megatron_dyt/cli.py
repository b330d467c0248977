"""`megatron-dyt COMMAND ...`: one name for what `python -m megatron_dyt.PART` does.

Training itself starts through torchrun, so it is not here: `torchrun ... -m megatron_dyt.pretrain`.
"""

from __future__ import annotations

import runpy
import sys

from megatron_dyt.errors import UserError, run_main

# Command -> (module, what it does).
COMMANDS = {
    "recipe": ("megatron_dyt.recipes", "a LLaMA size and how it is trained, as text or as flags"),
    "plan": ("megatron_dyt.planning", "parallel layout, memory and days of a recipe on a cluster"),
    "dry-run": (
        "megatron_dyt.planning.dry_run",
        "try a launch's flags under a simulated world, without GPUs",
    ),
    "prepare-data": ("megatron_dyt.data.prepare", "tokenize text into Megatron's indexed data sets"),
    "train-tokenizer": ("megatron_dyt.data.train_tokenizer", "make a SentencePiece tokenizer"),
    "eval": ("megatron_dyt.evaluation", "zero-shot evaluation of a checkpoint with lm-eval"),
    "eval-data": (
        "megatron_dyt.evaluation.export_data",
        "fetch the tasks' data for machines without network",
    ),
    "export": ("megatron_dyt.hf.export", "a checkpoint as a Hugging Face model"),
    "import": ("megatron_dyt.hf.import_model", "a Hugging Face LLaMA as a Megatron checkpoint"),
    "convert": ("megatron_dyt.hf.convert", "a Hugging Face LLaMA as one with DyT (experimental)"),
    "report": ("megatron_dyt.diagnostics.report", "compare runs: results.json and report.html"),
}


def main() -> None:
    """Run the command named first on the command line with the rest of it."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("\n".join(usage()))
        return
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}; there are {', '.join(COMMANDS)}.")
    module, _what = COMMANDS[name]
    sys.argv = [f"megatron-dyt {name}", *sys.argv[2:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def usage() -> list[str]:
    """The list of commands."""
    rows = [f"  {name:<16} {what}" for name, (_module, what) in COMMANDS.items()]
    return [
        "usage: megatron-dyt COMMAND ...",
        "",
        *rows,
        "",
        "megatron-dyt COMMAND --help shows its options.",
    ]


def entry() -> None:
    """The console script."""
    run_main(main)


if __name__ == "__main__":
    entry()
