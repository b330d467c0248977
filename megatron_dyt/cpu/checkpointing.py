"""Checkpoints of CPU processes: `--async-save` by a forked writer, and loading into PyTorch's Adam.

Saving: Megatron's persistent writer takes tensors from shared memory. From a GPU that is a copy; on CPU it
would be the parameter itself, which training changes while it is being written. A process forked at each save
has the parameters as they were at the fork, and starts in milliseconds.

Loading: Megatron loads into apex's or Transformer Engine's Adam, which count steps once per parameter group.
PyTorch's Adam keeps a step tensor for each parameter, and no state before its first step.
"""

import ctypes
import functools
import os
import pickle
import queue
import signal
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from megatron_dyt.patching import wrapper

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Results:
    """What a checkpoint writer hands back, whether it is this process or one forked from it.

    Megatron's own queue needs a server process, which outlives a rank that is killed.
    """

    def __init__(self) -> None:
        # Appending: one write call per item, so that two writers at a time do not mix.
        self._file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115
        self._read = 0

    def put(self, item: Any) -> None:
        """Add `item`, which must be picklable."""
        data = pickle.dumps(item)
        self._file.write(len(data).to_bytes(8, "little") + data)

    def get_nowait(self) -> Any:
        """The oldest item not yet taken. Raises `queue.Empty` when there is none."""
        head = os.pread(self._file.fileno(), 8, self._read)
        if not head:
            raise queue.Empty
        length = int.from_bytes(head, "little")
        data = os.pread(self._file.fileno(), length, self._read + 8)
        self._read += 8 + length
        return pickle.loads(data)


def results_queue(_original: Any) -> Callable[..., Results]:
    """In place of the function that returns Megatron's queue of results."""
    made: list[Results] = []

    def get(*_args: Any, **_kwargs: Any) -> Results:
        if not made:
            made.append(Results())
        return made[0]

    return get


@wrapper
def forking_caller(_original: Any, _queue: Any) -> Any:
    """In place of the choice between a persistent writer process and a forked one: always forked."""
    from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller

    return TemporalAsyncCaller()


@wrapper
def ending_with_its_rank(schedule: Callable[..., None], caller: Any, request: Any) -> None:
    """The start of a forked writer, which is killed when its rank is: nobody could finish the save."""
    if request.async_fn is not None:
        request = request._replace(async_fn=functools.partial(_write, os.getpid(), request.async_fn))
    schedule(caller, request)


def _write(rank_process: int, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux only
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != rank_process:
            os._exit(1)  # It died before it could be asked for.
    write(*args, **kwargs)


@wrapper
def with_state(state_dict: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """`state_dict` of an optimizer that has not stepped: as after step 0, instead of an error."""
    if self.optimizer is not None and not self.optimizer.state:
        self.init_state_fn(self.optimizer, self.config)
        for state in self.optimizer.state.values():
            state["step"] = torch.tensor(0.0)
    return state_dict(self, *args, **kwargs)


@wrapper
def with_own_steps(load_state_dict: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """`load_state_dict`, after which every parameter has the loaded step, in a tensor of its own.

    Megatron gives all parameters one tensor, which would advance once for each of them in every
    step, and then copies step 0 of the fresh optimizer over it: Adam's bias correction would start
    again.
    """
    result = load_state_dict(self, *args, **kwargs)
    for group in self.optimizer.param_groups:
        for parameter in group["params"]:
            self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))
    return result


@wrapper
def into_torch_state(
    set_states: Callable[..., Any], optimizer: Any, model_param: Any, tensors: dict[str, Any]
) -> Any:
    """The copy of loaded values into a parameter and its optimizer state.

    Outside autograd, because fp32 parameters are views of leaves. The format that every layout can
    load (`--dist-ckpt-optim-fully-reshardable`) has no step for each parameter, and Megatron looks for one
    wherever the state has a tensor; what is not a tensor it skips.
    """
    with torch.no_grad():
        return set_states(optimizer, model_param, {"step": None, **tensors})
