"""No update with values that are not finite, and no alpha that an update makes <= 0, unnoticed.

Megatron's own flags decide what happens. With `--check-for-nan-in-loss-and-grad` (its default) a gradient
that is not finite stops the run; without it the step is skipped and counted as a skipped iteration, as
Megatron does under fp16 loss scaling. `--dyt-on-bad-alpha` says the same for alpha. In each case the
message names layer, role and parameter.

The guard hardly has the host wait for the device: the gradient's norm is the one that Megatron computes for
clipping, and alpha is read where Megatron waits for the optimizer's step anyway (its `update_successful` is
reduced and read there). It adds one all-reduce of two integers per step, so that all ranks come to one
verdict and none is left waiting for one that stopped; and where no norm counts the alphas' gradients, one of
a single integer about these, read beside the norm.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dyt import world
from megatron_dyt.config import DyTConfig, is_dyt
from megatron_dyt.errors import TrainingFault
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import Site, find_sites, global_name, unwrap
from megatron_dyt.patching import wrapper

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.core.rerun_state_machine import RerunStateMachine
    from megatron.core.transformer.transformer_config import TransformerConfig

_log = logging.getLogger(__name__)

# Findings, and ranks of each, that a message names: a NaN spreads to hundreds of parameters on all ranks.
SHOWN = 6
# Depth of what is behind the last layer (final norm, output layer): larger than any layer's number.
_END = 1 << 30


class Optimizer(Protocol):
    """What the guard uses of `MegatronOptimizer`."""

    config: OptimizerConfig

    def get_grad_norm(self) -> float: ...
    def clip_grad_norm(self, clip_grad: float) -> float: ...
    def step_with_ready_grads(self) -> bool: ...
    def step(self) -> tuple[bool, float | None, int | None]: ...


@dataclass(frozen=True)
class Finding:
    """Something bad at a place.

    Attributes:
        depth: the layer's number, 0 for the embedding, _END behind the last layer.
        text: such as "layer 3 attn decoder.layers.2.input_layernorm.alpha (gradient)".
        cause: a bad value, of which bad gradients are the result.
    """

    depth: int
    text: str
    cause: bool = False

    @classmethod
    def at(cls, layer: int | None, role: str, name: str, what: str = "", cause: bool = False) -> Finding:
        """`what` is bad of the parameter or module `name`, which belongs to a layer or to none."""
        words = ("" if layer is None else f"layer {layer}", role, name, what)
        depth = layer if layer is not None else 0 if name.startswith("embedding") else _END
        return cls(depth, " ".join(filter(None, words)), cause)


class Guard:
    """Watches one rank's optimizer step. Every rank of the world must have one.

    Args:
        chunks: the model's chunks on this rank.
        optimizer: Megatron's optimizer; `install` puts the guard around its step.
        strict: stop at a gradient that is not finite, instead of skipping the step.
        on_bad_alpha: "stop" or "report", when an update makes an alpha <= 0. One that is not finite
            always stops.
        step: gives the number of the current step, for messages.
    """

    def __init__(
        self,
        chunks: list[nn.Module],
        optimizer: Optimizer,
        *,
        strict: bool = True,
        on_bad_alpha: str = "stop",
        step: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.chunks = [unwrap(chunk) for chunk in chunks]
        self.sites = find_sites(chunks)
        self.optimizer = optimizer
        self.strict = strict
        self.on_bad_alpha = on_bad_alpha
        self.step = step
        self.norm: float | None = None
        self.refused = False
        self.rerunning = False
        self.bad_inputs: list[Finding] = []

    def install(self) -> None:
        """Put the guard around this optimizer's step, its norm and its update."""
        optimizer: Any = self.optimizer
        for name in ("get_grad_norm", "clip_grad_norm"):
            setattr(optimizer, name, self._keep_norm(getattr(optimizer, name)))
        optimizer.step_with_ready_grads = self._guard_update(optimizer.step_with_ready_grads)
        optimizer.step = self._guard_step(optimizer.step)

    def _keep_norm(self, original: Callable[..., float]) -> Callable[..., float]:
        @functools.wraps(original)
        def norm(*args: float, **kwargs: float) -> float:
            self.norm = original(*args, **kwargs)
            return self.norm

        return norm

    def _guard_update(self, original: Callable[[], bool]) -> Callable[[], bool]:
        @functools.wraps(original)
        def step_with_ready_grads() -> bool:
            self._complete_norms()
            self.refused = not (all(map(math.isfinite, self._norms())) and self._uncounted_are_finite())
            return False if self.refused else original()

        return step_with_ready_grads

    def _complete_norms(self) -> None:
        """Have Megatron compute the norms that it leaves out with --clip-grad 0."""
        if self.norm is None:
            self.optimizer.get_grad_norm()
        # Of the MTP layers with --mtp-detach-heads, which the other norm does not count.
        by_group = getattr(self.optimizer, "_compute_grad_norms_by_group", None)
        if by_group is not None and not self.optimizer.config.clip_grad > 0:
            by_group()

    def _uncounted_are_finite(self) -> bool:
        """Whether the alphas' gradients are finite on all ranks where no norm counts them."""
        # The config's, as a pipeline stage may have no site.
        configs = [getattr(chunk, "config", None) for chunk in self.chunks]
        dyts: list[DyTConfig | None] = [getattr(config, "dyt", None) for config in configs]
        if all(dyt is None or dyt.alpha_in_grad_norm for dyt in dyts):
            return True
        gradients = [_gradient(site.module.alpha_parameter) for site in self.sites]
        checks = [_local(each).isfinite().all() for each in gradients if each is not None]
        # One number of all sites: each that the host reads would be a wait for the device.
        flag = torch.zeros((), dtype=torch.int32, device=self._device())
        if checks:
            flag += ~torch.stack(checks).all()
        if world.size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return not flag

    def _norms(self) -> list[float]:
        # From 0.19 the MTP layers may be clipped by a norm of their own.
        others = getattr(self.optimizer, "grad_norms_by_group", {}).values()
        return [float(norm) for norm in (self.norm, *others) if norm is not None]

    def _guard_step[T](self, original: Callable[[], T]) -> Callable[[], T]:
        @functools.wraps(original)
        def step() -> T:
            self.norm, self.refused = None, False
            # Megatron-FSDP gives the module other parameters during the step; those of before are updated.
            alphas = [site.module.alpha_parameter for site in self.sites]
            before = self._values(alphas)
            result = original()
            self._judge(before, self._values(alphas))
            return result

        return step

    @torch.no_grad()
    def _values(self, parameters: list[nn.Parameter]) -> Tensor:
        """The alphas of the sites' parameters, copied in fp32; nan where another rank has it (FSDP)."""
        if not parameters:
            return torch.zeros(0, device=self._device())
        found = []
        for site, parameter in zip(self.sites, parameters, strict=True):
            value = _value(parameter)
            # exp(-inf) above a floor would be a good alpha.
            found.append(torch.where(value.isfinite(), site.module.effective_alpha(value), value))
        return torch.cat(found)

    def _device(self) -> torch.device | int:
        parameter = next((p for chunk in self.chunks for p in chunk.parameters()), None)
        return torch.cuda.current_device() if parameter is None else parameter.device

    @torch.no_grad()
    def _judge(self, before: Tensor, after: Tensor) -> None:
        """Agree with all ranks on whether something is bad, and act on it."""
        bad = _turned_bad(before, after).any()
        refused = torch.full_like(bad, self.refused)
        flags = torch.stack([refused, bad]).int()
        if world.size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        any_refused, any_bad = flags.tolist()
        if any_refused:
            self._on_gradient()
        if any_bad:
            self._on_alpha(before, after)

    def _on_gradient(self) -> None:
        found = merge(gather(self.bad_gradients()))
        norms = ", ".join(f"{norm:g}" for norm in self._norms())
        what = f"{self._when()}the gradient is not finite (norm {norms}) and was not applied. {found}"
        if self.strict:
            raise TrainingFault(
                f"{what} Go on from the last checkpoint, with a smaller --lr or other data; with "
                "--no-check-for-nan-in-loss-and-grad such steps are skipped."
            )
        _log.warning(f"{what} The step is skipped.")

    def _on_alpha(self, before: Tensor, after: Tensor) -> None:
        changes = zip(self.sites, before.tolist(), after.tolist(), _turned_bad(before, after), strict=True)
        bad = [(site, was, now) for site, was, now, turned in changes if turned]
        found = gather(
            [
                Finding.at(s.layer, s.module.role, s.name, f"has alpha {now:.4g}, was {was:.4g}")
                for s, was, now in bad
            ]
        )
        fatal = any(not math.isfinite(now) for _, _, now in bad)
        what = f"{self._when()}an update made alpha <= 0 or not finite: {merge(found)}"
        if self.on_bad_alpha == "stop" or any(world.gather(fatal)):
            raise TrainingFault(
                f"{what} Nothing of it was saved. Go on from the last checkpoint with a smaller --lr or a "
                "longer warm-up; --dyt-on-bad-alpha report goes on where alpha is finite."
            )
        _log.warning("%s", what)

    def _when(self) -> str:
        step = self.step()
        return "" if step is None else f"step {step}: "

    def bad_gradients(self) -> list[Finding]:
        """This rank's parameters whose gradient, or which themselves, are not finite; the last first."""
        found = []
        for name, layer, role, parameter in self._parameters():
            kinds = {"value": parameter, "gradient": _gradient(parameter)}
            bad = [kind for kind, tensor in kinds.items() if tensor is not None and not _finite(tensor)]
            if bad:
                found.append(Finding.at(layer, role, name, f"({' and '.join(bad)})", cause="value" in bad))
        return found[::-1]

    def watch_inputs(self, on: bool) -> None:
        """Look for the first site whose input is not finite. It reads every input: for a rerun only."""
        self.rerunning = on
        if on:
            self.bad_inputs = []
        for site in self.sites:
            site.module.probe = functools.partial(self._check_input, site) if on else None

    def _check_input(self, site: Site, _module: DyTNorm, x: Tensor) -> None:
        if not _finite(x):
            self.bad_inputs.append(Finding.at(site.layer, site.module.role, site.name))

    def where_everywhere(self) -> str:
        """What is not finite on any rank; all ranks must call it."""
        found = f"{self._when()}not finite: {merge(gather(self.bad_gradients()))}"
        first = gather(self.bad_inputs[:1])
        if not first:
            return found
        return f"{found} The first input that was not: {min(first, key=lambda each: each.depth).text}."

    def _parameters(self) -> Iterator[tuple[str, int | None, str, nn.Parameter]]:
        for chunk in self.chunks:
            for local, parameter in chunk.named_parameters():
                layer, name = global_name(chunk, local)
                owner = chunk.get_submodule(local.rpartition(".")[0])
                yield name, layer, owner.role if isinstance(owner, DyTNorm) else _part(local), parameter


def _turned_bad(before: Tensor, after: Tensor) -> Tensor:
    """Which alphas an update made <= 0 or not finite (nan on both sides: another rank has it)."""
    sign = (before > 0) & ~(after > 0)
    return sign | (before.isfinite() & ~after.isfinite())


def _value(parameter: nn.Parameter) -> Tensor:
    alpha = _local(parameter.detach())
    return alpha.float() if alpha.numel() else alpha.new_full((1,), math.nan, dtype=torch.float32)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor (Megatron-FSDP), any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    gradient = getattr(parameter, "main_grad", None)
    return parameter.grad if gradient is None else gradient


def _finite(tensor: Tensor) -> bool:
    return bool(_local(tensor).isfinite().all())


def _part(name: str) -> str:
    """The role that a DyT in front of this parameter's layer has."""
    return "attn" if "attention." in name else "ffn" if "mlp." in name else ""


def gather[T](items: list[T]) -> dict[T, list[int]]:
    """What any rank has, each with the ranks that have it."""
    found: dict[T, list[int]] = {}
    for rank, part in enumerate(world.gather(items)):
        for item in part:
            found.setdefault(item, []).append(rank)
    return found


def merge(found: dict[Finding, list[int]]) -> str:
    """Findings of all ranks as one sentence: bad values first, then the deepest layer, where the backward
    pass met it first."""
    if not found:
        return "Every single gradient is finite: their norm overflows."
    ordered = sorted(found, key=lambda finding: (not finding.cause, -finding.depth))
    shown = "; ".join(f"{each.text} on rank {_some(found[each])}" for each in ordered[:SHOWN])
    more = f"; and {len(found) - SHOWN} more, in shallower layers" if len(found) > SHOWN else ""
    return f"{shown}{more}."


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + (" …" if len(numbers) > SHOWN else "")


# --- in Megatron's training loop ---------------------------------------------------------------------

_active: Guard | None = None


@wrapper
def wrap_setup[**P](
    original: Callable[P, tuple[list[nn.Module], Optimizer | None, object]], *args: P.args, **kwargs: P.kwargs
) -> tuple[list[nn.Module], Optimizer | None, object]:
    """`training.setup_model_and_optimizer` that guards the optimizer of a DyT model."""
    global _active
    result = original(*args, **kwargs)
    _active = _guard_of(*result[:2])
    if _active is not None:
        _active.install()
    return result


def _guard_of(chunks: list[nn.Module], optimizer: Optimizer | None) -> Guard | None:
    from megatron.training import get_args

    args = get_args()
    config: TransformerConfig = unwrap(chunks[0]).config
    if not is_dyt(config) or optimizer is None:
        return None
    if getattr(args, "optimizer_cuda_graph", False):
        _log.warning("--optimizer-cuda-graph: alpha and gradients are not checked in a captured step.")
        return None
    return Guard(
        chunks,
        optimizer,
        strict=args.check_for_nan_in_loss_and_grad,
        on_bad_alpha=getattr(args, "dyt_on_bad_alpha", None) or "stop",  # Absent with --yaml-cfg.
        step=lambda: getattr(args, "curr_iteration", -1) + 1 or None,
    )


@wrapper
def wrap_train_step[**P, R: tuple[object, ...]](
    original: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> R:
    """`training.train_step` that says where, when Megatron's own check stops the run.

    Megatron raises on the rank that sees it, or has all ranks leave for a rerun elsewhere.
    """
    if _active is None:
        return original(*args, **kwargs)
    try:
        result = original(*args, **kwargs)
    except RuntimeError as error:
        if not isinstance(error, TrainingFault) and (found := _active.bad_gradients()):
            error.add_note(f"megatron_dyt: not finite: {merge({each: [world.rank()] for each in found})}")
        raise
    should_exit = result[3]
    if should_exit:
        _log.info(_active.where_everywhere())
    return result


@wrapper
def wrap_save(original: Callable[..., object], *args: object, **kwargs: object) -> object:
    """`training.save_checkpoint_and_time`, which Megatron calls before it exits for a result that was not
    finite, even without --save: there it would end with a TypeError about the missing path."""
    from megatron.training import get_args

    flags = get_args()
    if is_dyt(flags) and flags.save is None:
        _log.warning("no checkpoint is saved, as there is no --save; the lines above say why one was due")
        return None
    return original(*args, **kwargs)


@wrapper
def wrap_rerun(
    original: Callable[..., bool], self: RerunStateMachine, *args: object, **kwargs: object
) -> bool:
    """`RerunStateMachine.should_run_forward_backward` that has inputs watched in a rerun."""
    run = original(self, *args, **kwargs)
    if _active is not None and _active.rerunning != (again := run and _is_second_run(self)):
        _active.watch_inputs(again)
    return run


def _is_second_run(machine: RerunStateMachine) -> bool:
    # Not where every step is run twice, for --rerun-mode report_stats.
    return machine.mode.name == "VALIDATE_RESULTS" and machine.state.name == "RERUNNING_IN_PLACE"
