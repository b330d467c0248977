"""A few gradient steps on all fitted DyTs together, and on nothing else.

The fit of `calibrate.py` is the best for each site by itself. What counts is how near the last DyT comes to
what its norm gave, and for that an error of an early site matters as far as later ones amplify it.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dyt.nn.calibrate import Site, hooks, run_doubled, sequences_in

_log = logging.getLogger(__name__)

# Steps, of one sequence each: with more than 64 a step gains little.
MOST = 64
# Of a parameter's size, per step of Adam; it falls to 0. The small LLaMA of docs/convert.md is within 0.015
# nats of this at 0.02, and worse by 0.02 to 0.11 at 0.04.
RATE = 0.01
# Sequences on which it must have become better.
CHECKED = 8


def refine(model: nn.Module, sites: Sequence[Site], batch: Tensor | Mapping[str, Any]) -> None:
    """Change the sites' parameters, and no others, in place, to bring the last DyT nearer to its norm.

    They are left as they were where the model cannot be differentiated, or where the last DyT did not come
    nearer on the first `CHECKED` sequences.

    Args:
        sites: fitted, see `calibrate`.
        batch: see `run_doubled`.
    """
    ours = [parameter for site in sites for parameter in site.dyt.parameters()]
    before = [parameter.detach().clone() for parameter in ours]
    last = _Last()
    with hooks(sites, last.look), _only_trained(model, ours):
        start = _error(model, last, batch)
        try:
            _descend(model, sites, batch, last)
            end = _error(model, last, batch)
        except RuntimeError as error:  # In-place operations, operators without a gradient, no memory.
            _log.info(f"the calibration ends with the fit, as the model has no gradient: {error}")
            end = start
    if not end < start:  # Not finite, either.
        if end != start:
            took = f"steps from it took the error from {start:.3g} to {end:.3g}"
            _log.info(f"the calibration ends with the fit: {took}")
        with torch.no_grad():
            for parameter, value in zip(ours, before, strict=True):
                parameter.copy_(value)


class _Last:
    """The last site of a forward pass: what its norm gives, and its DyT."""

    expected: Tensor
    made: Tensor

    def look(self, site: Site, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.expected = site.norm(x.chunk(2, site.batch_dim)[0])
        self.made = site.dyt.forward(x.chunk(2, site.batch_dim)[1])
        return torch.cat([self.expected, self.made], site.batch_dim)

    def error(self) -> Tensor:
        """Squared error over the square of the norm's output, fp32."""
        expected = self.expected.float()
        return (self.made.float() - expected).square().sum() / expected.square().sum().clamp_min(1e-30)

    def scaled_error(self) -> Tensor:
        """`error` for a backward pass: times what keeps gradients of many small parts within fp16's range."""
        return self.error() * (self.made.numel() ** 0.5 if self.made.dtype == torch.float16 else 1.0)


@contextlib.contextmanager
def _only_trained(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients are computed for these parameters of the model alone."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in flags:
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for parameter in parameters:
            parameter.grad = None


@torch.no_grad()
def _error(model: nn.Module, last: _Last, batch: Tensor | Mapping[str, Any]) -> float:
    run_doubled(model, batch, slice(CHECKED))
    return float(last.error())


@torch.enable_grad()
def _descend(model: nn.Module, sites: Sequence[Site], batch: Tensor | Mapping[str, Any], last: _Last) -> None:
    """Adam, with a rate for each parameter. Raises RuntimeError where no gradient comes.

    It works on copies of fp32: a step of 1 % is lost to bf16's rounding, and fp16 has no place for its
    averages.
    """
    named = [(site, name, parameter) for site in sites for name, parameter in site.dyt.named_parameters()]
    ours = [parameter for _, _, parameter in named]
    copies = [_at_least_fp32(parameter.detach()).clone() for parameter in ours]
    sizes = [
        float((site.dyt.weight if name == "bias" else parameter).detach().abs().mean())
        for site, name, parameter in named
    ]
    optimizer = torch.optim.Adam([{"params": [copy]} for copy in copies], betas=(0.9, 0.95))
    steps = min(sequences_in(batch), MOST)
    for step in range(steps):
        run_doubled(model, batch, slice(step, step + 1))
        # None of a DyT that does not lead to the last one, as in another tower.
        gradients = torch.autograd.grad(last.scaled_error(), ours, allow_unused=True)
        for copy, gradient, group, size in zip(copies, gradients, optimizer.param_groups, sizes, strict=True):
            copy.grad = None if gradient is None else _at_least_fp32(gradient)
            group["lr"] = RATE * size * (1 - step / steps)
        optimizer.step()
        with torch.no_grad():
            for parameter, copy in zip(ours, copies, strict=True):
                parameter.copy_(copy)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
