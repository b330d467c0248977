"""Runs that must not start, one after the other in one process per rank: `disagreeing.py CASES.json`.

CASES.json is a list of {"port", "seconds", "ranks": [{"argv", "version", "plugin"}]}. Each case has a
store of its own at its port. How a case ended is a line of JSON on stdout: [exception, message].
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import megatron_dyt
from megatron_dyt import pretrain, rendezvous
from megatron_dyt.mcore import handshake
from megatron_dyt.mcore.register import unregister


def run(case: dict[str, Any], rank: int) -> list[str]:
    """Start training as the case says for this rank."""
    os.environ["MASTER_PORT"] = str(case["port"])
    os.environ[rendezvous.VARIABLE] = str(case["seconds"])
    rendezvous._store = None
    mine = case["ranks"][rank]
    handshake.__version__ = mine["version"]  # type: ignore[attr-defined]
    try:
        if mine["plugin"]:
            pretrain.main(["--device", "cpu", *mine["argv"]])
        else:
            without_plugin(mine["argv"])
    except (Exception, SystemExit) as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def without_plugin(argv: list[str]) -> None:
    """As a script that does not register it would begin."""
    unregister()
    sys.argv = ["pretrain_gpt.py", *argv]
    from megatron.training.arguments import parse_args

    try:
        parse_args()
    finally:
        megatron_dyt.register()


def main(file: str) -> None:
    for case in json.loads(Path(file).read_text(encoding="utf-8")):
        print("RESULT", json.dumps(run(case, int(os.environ["RANK"]))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
