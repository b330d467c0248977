"""Records with which command a run was trained, or checks that a run was trained with this command.

python examples/quickstart/record.py --write FILE --learning-rate R --seconds S -- COMMAND...
python examples/quickstart/record.py --check FILE -- COMMAND...     (exit code 0: the same command)
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from megatron_dyt.data.files import read_json, write_json


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 1 when --check finds another command."""
    parser = argparse.ArgumentParser(description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE")
    action.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("command", nargs="+")
    args = parser.parse_args(argv)
    command = shlex.join(args.command)
    if args.check:
        return 0 if (read_json(args.check) or {}).get("command") == command else 1
    record = {"command": command, "learning_rate": args.learning_rate, "seconds": args.seconds}
    write_json(args.write, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
