"""Show a recipe: `python -m megatron_dyt.recipes 70b` for a reader, `--format flags` for a script."""

from __future__ import annotations

import argparse
import shlex
import sys

from megatron_dyt.errors import run_main
from megatron_dyt.recipes import NORMS, load, names


def main(argv: list[str] | None = None) -> int:
    """Run the command; raises UserError for a recipe that does not exist."""
    parser = argparse.ArgumentParser(
        prog="megatron-dyt recipe", description="Show a training recipe, or Megatron's flags for it."
    )
    parser.add_argument("model", nargs="?", help=f"one of {', '.join(names())}; without it, all are listed")
    parser.add_argument("--norm", choices=NORMS, default=NORMS[0])
    parser.add_argument("--format", choices=("text", "flags"), default="text")
    args = parser.parse_args(argv)
    if args.model is None:
        print("\n".join(load(name).describe()[0] for name in names()))
        return 0
    recipe = load(args.model)
    flags = shlex.join(recipe.flags(args.norm))
    print(flags if args.format == "flags" else "\n".join([*recipe.describe(), f"flags: {flags}"]))
    return 0


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
