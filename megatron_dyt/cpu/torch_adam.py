"""PyTorch's Adam inside Megatron's distributed optimizer, when a checkpoint is loaded.

Megatron loads into apex's or Transformer Engine's Adam, which count steps once for a parameter
group. PyTorch's Adam keeps a step tensor for each parameter, and no state before its first step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def with_state(state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """`state_dict` of an optimizer that has not stepped: as after step 0, instead of an error."""

    @functools.wraps(state_dict)
    def complete(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is not None and not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return state_dict(self, *args, **kwargs)

    return complete


def with_own_steps(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """`load_state_dict`, after which every parameter has the loaded step, in a tensor of its own.

    Megatron gives all parameters one tensor, which would advance once for each of them in every
    step, and then copies step 0 of the fresh optimizer over it: Adam's bias correction would start
    again.
    """

    @functools.wraps(load_state_dict)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = load_state_dict(self, *args, **kwargs)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))
        return result

    return load


def into_torch_state(set_states: Callable[..., Any]) -> Callable[..., Any]:
    """The copy of loaded values into a parameter and its optimizer state.

    Outside autograd, because fp32 parameters are views of leaves. The format that every layout can
    load (`--dist-ckpt-optim-fully-reshardable`) has no step for each parameter, and Megatron looks for one
    wherever the state has a tensor; what is not a tensor it skips.
    """

    @functools.wraps(set_states)
    def copy(optimizer: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        with torch.no_grad():
            return set_states(optimizer, model_param, {"step": None, **tensors})

    return copy
