"""Run an unmodified Megatron script with DyT available in it.

    python -m megatron_dyt.run [--device {auto,cpu,cuda}] SCRIPT ARGS...
    python -m megatron_dyt.run [--device {auto,cpu,cuda}] -m MODULE ARGS...

The script sees what it would see when started directly: its arguments, its directory first on the
import path, `__name__ == "__main__"`. Under torchrun: `torchrun ... -m megatron_dyt.run SCRIPT ARGS`.
"""

import os
import runpy
import sys

from megatron_dyt.cpu import device
from megatron_dyt.errors import UserError, run_main
from megatron_dyt.training import dataset_helpers, launch

_USAGE = "python -m megatron_dyt.run [--device {auto,cpu,cuda}] (SCRIPT | -m MODULE) ARGS..."


def main(argv: list[str] | None = None) -> None:
    """Run the script or module that `argv` (default: the command line) names.

    Raises `UserError` when there is none, or for a device that is not there.
    """
    options, target = _split(sys.argv[1:] if argv is None else argv)
    as_module = target[0] == "-m"
    if not as_module:
        # First of all, so that a script in a Megatron checkout gets that checkout's megatron.
        sys.path[0] = os.path.dirname(os.path.abspath(target[0]))
    device.activate(options)
    launch.prepare_process()

    import megatron_dyt

    megatron_dyt.register()
    dataset_helpers.prepare()
    sys.argv = target[1:] if as_module else target
    with launch.clean_end():
        if as_module:
            runpy.run_module(target[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target[0], run_name="__main__")


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our options, and the script or `-m MODULE` with its arguments (which may look like ours)."""
    count = 0
    while count < len(argv) and argv[count].split("=")[0] == "--device":
        count += 1 if "=" in argv[count] else 2
    options, target = argv[:count], argv[count:]
    if not target or target == ["-m"]:
        raise UserError(f"no script was given; usage: {_USAGE}")
    if target[0] != "-m" and target[0].startswith("-"):
        raise UserError(f"unknown option {target[0]!r} before the script; usage: {_USAGE}")
    if target[0] != "-m" and not os.path.isfile(target[0]):
        raise UserError(f"no such script: {target[0]!r}; usage: {_USAGE}")
    return options, target


if __name__ == "__main__":
    run_main(main)
