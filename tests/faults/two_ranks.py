"""Each of two ranks says what it learns of the checkpoint that it is asked to verify."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

from megatron_dyt.checkpoints import damage
from megatron_dyt.checkpoints.iterations import DamagedCheckpoint

dist.init_process_group("gloo")
for directory in sys.argv[1:]:
    try:
        damage.verify(directory, {"first", "second"})
        said = "whole"
    except DamagedCheckpoint as error:
        said = str(error)
    # One write call, so that the two ranks' lines do not mix.
    sys.stdout.write(f"{Path(directory).name} on rank {dist.get_rank()}: {said}\n")
    sys.stdout.flush()
dist.destroy_process_group()
