"""Keeps in a run's directory which command trains it: an interrupted run continues, another starts over.

python examples/quickstart/record.py --begin DIR --data FILE -- COMMAND...
    notes the command and the data's checksum in DIR/begun.json; empties DIR when it was begun with others
python examples/quickstart/record.py --finish DIR --learning-rate R --seconds S
    writes DIR/run.json, which says that training is done
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path

from megatron_dyt.atomic import read_json, sha256, write_json


def begin(directory: Path, data: Path, command: list[str]) -> None:
    """Make `directory` one that belongs to this command and these data."""
    record = {"command": shlex.join(command), "data_sha256": sha256(data)}
    if directory.is_dir() and read_json(directory / "begun.json") != record:
        print(f"{directory} was begun with another command or other data: starting it over", flush=True)
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "begun.json", record)


def finish(directory: Path, learning_rate: float, seconds: float) -> None:
    """Record that training is done, with the command that did it."""
    begun = read_json(directory / "begun.json")
    record = {"command": begun["command"], "learning_rate": learning_rate, "seconds": seconds}
    write_json(directory / "run.json", record)


def main(argv: list[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--begin", type=Path, metavar="DIR")
    action.add_argument("--finish", type=Path, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="FILE")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("command", nargs="*")
    args = parser.parse_args(argv)
    if args.begin:
        begin(args.begin, args.data, args.command)
    else:
        finish(args.finish, args.learning_rate, args.seconds)


if __name__ == "__main__":
    main()
