"""What each DyT sees in training: a line a role at start-up, and statistics every N steps.

DyT does not rescale its input, so alpha * std(x) says whether tanh is used at all (near 0 DyT is a
constant factor) or saturated (above about 2 its gradient dies).
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from megatron_dyt.mcore import safety_net
from megatron_dyt.mcore.embedding import EmbeddingScale
from megatron_dyt.mcore.norm import DyTNorm, dyt_sites

# alpha * std(x) at the start. The paper's models start at 0.09 (70B, FFN) to 1.02 (7B, attention);
# from 1.5 on our small runs train worse (docs/initial-scale.md).
GOOD_RANGE = (0.05, 1.5)
# Gain of a linear layer, std * sqrt(hidden): 0.64 to 1.8 in the paper. Far below it, activations fade
# from layer to layer and nothing restores them.
GOOD_GAIN = (0.4, 3.0)
SATURATED = 2.0


@dataclass(frozen=True)
class Site:
    """One DyT of the model: its full name, and its layer's number from 1 (None for the final one)."""

    name: str
    layer: int | None
    module: DyTNorm


@dataclass(frozen=True)
class Sample:
    """One site in one forward pass, before the update (tensors, read at the end of the step)."""

    alpha: torch.Tensor
    std: torch.Tensor
    saturated: torch.Tensor


class Monitor:
    """Looks at a model's DyT sites in chosen steps. Costs nothing in the others.

    Args:
        chunks: the model's chunks on this rank (several under virtual pipeline stages).
        linear_gain: std * sqrt(hidden) of the linear layers, for the start-up warning.
        stats_file: JSON-lines file, or None.
        interval: steps between two lines of it.
        speaks: whether this rank prints (one rank of each pipeline stage does).
    """

    def __init__(
        self,
        chunks: list[nn.Module],
        *,
        linear_gain: float,
        stats_file: str | None = None,
        interval: int = 0,
        speaks: bool = True,
    ) -> None:
        self.sites = find_sites(chunks)
        self.scale = find_embedding_scale(chunks)
        self.scale_value: torch.Tensor | None = None
        self._scale_hook: RemovableHandle | None = None
        self.linear_gain = linear_gain
        self.stats_file = stats_file
        self.interval = interval
        self.speaks = speaks
        self.samples: dict[DyTNorm, Sample] = {}
        self.started = False

    def look(self) -> None:
        """Record the next forward pass of every site."""
        self.samples, self.scale_value = {}, None
        if self.scale is not None and self._scale_hook is None:
            # In its forward pass: between two steps Megatron-FSDP has parts of a parameter only.
            self._scale_hook = self.scale.register_forward_pre_hook(self._record_scale)
        for site in self.sites:
            site.module.probe = self._record

    def stop_looking(self) -> None:
        """Record nothing any more."""
        if self._scale_hook is not None:
            self._scale_hook.remove()
            self._scale_hook = None
        for site in self.sites:
            site.module.probe = None

    def _record_scale(self, module: nn.Module, _inputs: Any) -> None:
        if module.training and self.scale_value is None:
            self.scale_value = module.scale.detach().clone()  # type: ignore[operator]

    def _record(self, module: DyTNorm, x: torch.Tensor) -> None:
        # Not of an evaluation between two steps.
        if not module.training or module in self.samples or x.numel() == 0:
            return
        with torch.no_grad():
            values = x.detach().float()
            # A copy: the optimizer changes the parameter in place before this is read.
            alpha = module.alpha.detach().float().clone()
            self.samples[module] = Sample(
                alpha, values.std(correction=0), ((values * alpha).abs() > SATURATED).float().mean()
            )

    def after_step(self, iteration: int) -> None:
        """Called when training step `iteration` is done."""
        looked = bool(self.samples)
        if not self.started and looked:
            self.started = True
            if self.speaks:
                print("\n".join(self.start_up_lines()), flush=True)
        if looked and self._due(iteration) and self.speaks and self.stats_file:
            self.write(iteration)
        self.stop_looking()
        self.samples = {}
        if self._due(iteration + 1):
            self.look()

    def _due(self, iteration: int) -> bool:
        # Step 1 as well, so that a curve starts where training did.
        return self.interval > 0 and (iteration % self.interval == 0 or iteration == 1)

    def start_up_lines(self) -> list[str]:
        """One line a role, one for the embedding scale, and warnings."""
        lines = []
        for role in dict.fromkeys(site.module.role for site in self.sites):
            sites = [s for s in self.sites if s.module.role == role and s.module in self.samples]
            if not sites:
                continue
            drive = [self.drive(site) for site in sites]
            alphas = [float(self.samples[site.module].alpha) for site in sites]
            fresh = min(alphas) == max(alphas)
            what = (
                f"alpha0 {alphas[0]:.4g}"
                if fresh
                else f"alpha {min(alphas):.3g} to {max(alphas):.3g} (trained)"
            )
            lines.append(
                f"DyT {role:<5} {len(sites):3d} sites, {what}, "
                f"alpha*std(x) of the first batch {min(drive):.3g} to {max(drive):.3g}"
            )
            if fresh:
                lines += [self._warning(role, value) for value in {min(drive), max(drive)} if _off(value)]
        if self.scale_value is not None:
            lines.append(f"DyT embedding scale {float(self.scale_value):.4g}")
        if not GOOD_GAIN[0] <= self.linear_gain <= GOOD_GAIN[1]:
            lines.append(
                f"WARNING: DyT: linear layers start with gain std*sqrt(hidden) = {self.linear_gain:.2g}, "
                f"runs that train have {GOOD_GAIN[0]} to {GOOD_GAIN[1]}. DyT does not rescale: use "
                "--dyt-preset unit, or --init-method-std near 1/sqrt(hidden)."
            )
        return lines

    def _warning(self, role: str, value: float) -> str:
        low, high = GOOD_RANGE
        return (
            f"WARNING: DyT {role}: alpha*std(x) = {value:.3g} is outside {low} to {high}, where runs "
            f"train. Change --dyt-alpha-init-{role} or --dyt-embedding-scale, or use --dyt-preset unit."
        )

    def drive(self, site: Site) -> float:
        """alpha * std(x) of a site in the step that was looked at."""
        sample = self.samples[site.module]
        return abs(float(sample.alpha * sample.std))

    def write(self, iteration: int) -> None:
        """Append one line to the statistics file."""
        record: dict[str, Any] = {"iteration": iteration, "sites": []}
        for site in self.sites:
            if site.module not in self.samples:
                continue
            sample = self.samples[site.module]
            record["sites"].append(
                {
                    "name": site.name,
                    "role": site.module.role,
                    "layer": site.layer,
                    "alpha": float(sample.alpha),
                    "input_std": float(sample.std),
                    "alpha_std": self.drive(site),
                    "saturated": float(sample.saturated),
                }
            )
        if self.scale_value is not None:
            record["embedding_scale"] = float(self.scale_value)
        assert self.stats_file is not None
        os.makedirs(os.path.dirname(self.stats_file), exist_ok=True)
        with open(self.stats_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _off(value: float) -> bool:
    return not GOOD_RANGE[0] <= value <= GOOD_RANGE[1]


def find_sites(chunks: list[nn.Module]) -> list[Site]:
    """Every DyTNorm, named as in the whole model: layers count over pipeline stages."""
    sites = []
    for chunk in map(unwrap, chunks):
        for name, module in dyt_sites(chunk):
            layer, full = global_name(chunk, name)
            sites.append(Site(full, layer, module))
    return sites


def global_name(chunk: nn.Module, name: str) -> tuple[int | None, str]:
    """(layer number from 1, name with the global layer index) from a name in a stage's own model."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit() and parts[index - 1] == "layers":
            layer = chunk.get_submodule(".".join(parts[: index + 1]))
            number = int(getattr(layer, "layer_number", int(part) + 1))
            return number, ".".join([*parts[:index], str(number - 1), *parts[index + 1 :]])
    return None, name


def unwrap(chunk: nn.Module) -> nn.Module:
    """The model inside DDP and mixed precision wrappers."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk


def find_embedding_scale(chunks: list[nn.Module]) -> EmbeddingScale | None:
    """The embedding scale, on the rank that has it (not a copy of it)."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return next((each for each in modules if isinstance(each, EmbeddingScale) and not each.is_copy), None)


_active: Monitor | None = None


def wrap_setup(original: Callable[..., Any]) -> Callable[..., Any]:
    """`training.setup_model_and_optimizer` that starts a monitor on a DyT model.

    It also says which parts of a model of several keep another norm.
    """

    @functools.wraps(original)
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        global _active
        result = original(*args, **kwargs)
        for chunk in result[0]:
            safety_net.tell_other_norms(unwrap(chunk))
        _active = _monitor_of(result[0])
        if _active is not None:
            _active.look()
        return result

    return setup_model_and_optimizer


def wrap_training_log(original: Callable[..., Any]) -> Callable[..., Any]:
    """`training.training_log`, called once a step, that lets the monitor work afterwards."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def training_log(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if _active is not None:
            _active.after_step(signature.bind(*args, **kwargs).arguments["iteration"])
        return result

    return training_log


def _monitor_of(chunks: list[nn.Module]) -> Monitor | None:
    from megatron.core import parallel_state as mpu
    from megatron.training import get_args

    args = get_args()
    config: Any = unwrap(chunks[0]).config
    # In a model of several parts, such as LLaVA, one of them may be DyT.
    if config.normalization != "DyT" and not any(find_sites([chunk]) for chunk in chunks):
        return None
    stage = mpu.get_pipeline_model_parallel_rank()
    name = "dyt_stats.jsonl" if args.pipeline_model_parallel_size == 1 else f"dyt_stats.stage{stage}.jsonl"
    first = mpu.get_tensor_model_parallel_rank() == 0
    return Monitor(
        chunks,
        linear_gain=config.init_method_std * config.hidden_size**0.5,
        stats_file=os.path.join(args.save, name) if args.save else None,
        interval=getattr(args, "dyt_stats_interval", 0),  # Absent with --yaml-cfg.
        speaks=first and mpu.get_data_parallel_rank(with_context_parallel=True) == 0,
    )
