"""Runs a script without a GPU, and without registering DyT: a patched Megatron does that itself.

python on_cpu.py SCRIPT ARGS...
"""

import os
import runpy
import sys

from megatron_dyt import cpu
from megatron_dyt.training import dataset_helpers

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    cpu.enable()
    dataset_helpers.prepare()
    import megatron_dyt

    assert not megatron_dyt.is_registered()
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert megatron_dyt.is_registered()
