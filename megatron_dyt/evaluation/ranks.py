"""The processes of an evaluation: who takes which part of the work, and who reports.

Every data-parallel rank holds a whole model, alone or with its tensor-parallel peers, and knows all
requests. Peers take the same part, so their collectives match.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dyt import world
from megatron_dyt.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among those of the data-parallel `group`; None means it is the only process."""

    group: dist.ProcessGroup | None = None

    @property
    def index(self) -> int:
        """Which part is this process's, from 0."""
        return dist.get_rank(self.group) if self.group is not None else 0

    @property
    def count(self) -> int:
        """How many parts there are."""
        return dist.get_world_size(self.group) if self.group is not None else 1

    @property
    def reports(self) -> bool:
        """True on the one process that prints and writes."""
        return self.group is None or dist.get_rank() == 0

    def sum(self, part: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The sum of all parts, of any one shape and type, on every process (on the CPU)."""
        if self.count == 1:
            return part
        shared = part.to(device)
        dist.all_reduce(shared, group=self.group)
        return shared.cpu()

    def merge(self, part: dict[Any, Any]) -> dict[Any, Any]:
        """The union of all parts' dictionaries, on every process."""
        if self.count == 1:
            return part
        return {key: value for one in world.gather(part, self.group) for key, value in one.items()}

    def from_first(self, value: Any) -> Any:
        """What the reporting process calls this with, on every process, tensor-parallel peers too."""
        return value if self.group is None else from_first(value)

    def check_same(self, requests: Sequence[object]) -> None:
        """Raise `UserError` on all processes unless all have the same `requests`, which they divide."""
        if self.count == 1:
            return
        digest = hashlib.sha256(repr(requests).encode()).hexdigest()
        if len(set(world.gather(digest, self.group))) > 1:
            raise UserError(
                "the processes have made different requests of the same tasks: their documents or tokenizers "
                "differ. Give all nodes the same --task-data and tokenizer, or empty the data sets' caches "
                "(HF_DATASETS_CACHE)"
            )


def from_first(value: Any) -> Any:
    """What the first process calls this with, on every process of the job."""
    if world.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
