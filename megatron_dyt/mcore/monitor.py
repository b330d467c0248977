"""What each DyT sees in training: a line per role at start-up, and statistics every N steps.

DyT does not rescale its input, so alpha * std(x) says whether tanh is used at all (near 0 DyT is a
constant factor) or saturated (above about 2 its gradient dies).
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_dyt import log
from megatron_dyt.config import is_dyt
from megatron_dyt.mcore import ranks, trackers
from megatron_dyt.mcore.embedding import EmbeddingScale
from megatron_dyt.mcore.json_lines import JsonLines
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import find_sites, log_other_norms, unwrap
from megatron_dyt.nn.statistics import InputStatistics, input_statistics
from megatron_dyt.patching import bound, wrapper

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

_log = logging.getLogger(__name__)
# The first rank of every pipeline stage reports.
_info = functools.partial(_log.info, extra=log.ALL_RANKS)
_warning = functools.partial(_log.warning, extra=log.ALL_RANKS)

# alpha * std(x) at the start. The paper's models start at 0.09 (70B, FFN) to 1.02 (7B, attention). In a small
# model 0.1 costs 0.1 nats after 100 steps, 2 costs 0.4, in front of attention 0.01
# (docs/results.md#the-initial-alpha).
GOOD_RANGE, GOOD_ATTENTION = (0.05, 1.5), (0.05, 2.5)
# Gain of a linear layer, std * sqrt(hidden): 0.64 to 1.8 in the paper. Far below it, activations fade
# from layer to layer and nothing restores them.
GOOD_GAIN = (0.4, 3.0)
# How long the last rank waits for another stage's numbers: both have just ended the same step.
_SEND_SECONDS = 60.0


@dataclass(frozen=True)
class Sample:
    """One site in one forward pass, before the update: fp32 tensors, read at the end of the step.

    Attributes:
        alpha: (1,).
        input: statistics of x.
    """

    alpha: Tensor
    input: InputStatistics

    @property
    def drive(self) -> float:
        """alpha * std(x)."""
        return abs(float(self.alpha * self.input.std))


class SiteRecord(TypedDict):
    """One site in a line of the statistics file."""

    name: str
    role: str
    layer: int | None
    alpha: float
    input_std: float
    alpha_std: float
    saturated: float


class StatsRecord(TypedDict):
    """A line of the statistics file."""

    iteration: int
    sites: list[SiteRecord]
    embedding_scale: NotRequired[float]


@dataclass(eq=False)
class Monitor:
    """Looks at a model's DyT sites in chosen steps. Costs nothing in the others.

    Args:
        chunks: the model's chunks on this rank (several under virtual pipeline stages).
        linear_gain: std * sqrt(hidden) of the linear layers, for the start-up warning.
        preset: the one in use, which a warning must not advise.
        stats_file: where statistics are written, or None.
        interval: steps between two lines of it.
        reports: whether this rank logs and writes (one rank of each pipeline stage does).
        tracked: whether TensorBoard and W&B get the statistics too.
        stage, stages: which of how many pipeline stages this is.
    """

    chunks: InitVar[list[nn.Module]]
    _: KW_ONLY
    linear_gain: float
    preset: str = ""
    stats_file: JsonLines | None = None
    interval: int = 0
    reports: bool = True
    tracked: bool = False
    stage: int = 0
    stages: int = 1

    def __post_init__(self, chunks: list[nn.Module]) -> None:
        self.sites = find_sites(chunks)
        self.scale = find_embedding_scale(chunks)
        self.scale_value: Tensor | None = None
        self._scale_hook: RemovableHandle | None = None
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

    def _record_scale(self, module: EmbeddingScale, _inputs: tuple[Tensor, ...]) -> None:
        if module.training and self.scale_value is None:
            self.scale_value = module.scale.detach().clone()

    def _record(self, module: DyTNorm, x: Tensor) -> None:
        # Not of an evaluation between two steps.
        if not module.training or module in self.samples or x.numel() == 0:
            return
        with torch.no_grad():
            # A copy: the optimizer changes the parameter in place before this is read.
            alpha = module.effective_alpha().detach().float().clone()
            self.samples[module] = Sample(alpha, input_statistics(x, alpha, module.function, module.shift))

    def after_step(self, iteration: int) -> None:
        """Called when training step `iteration` is done."""
        looked = bool(self.samples)
        if not self.started and looked:
            self.started = True
            if self.reports:
                self.log_start()
        if self._due(iteration):
            record = self.record(iteration) if self.reports else None
            if looked and record and self.stats_file:
                self.stats_file.append(record)
            if self.tracked:
                self.track(record, iteration)
        self.stop_looking()
        self.samples = {}
        if self._due(iteration + 1):
            self.look()

    def _due(self, iteration: int) -> bool:
        # Step 1 as well, so that a curve starts where training did.
        return self.interval > 0 and (iteration % self.interval == 0 or iteration == 1)

    def log_start(self) -> None:
        """One line per role, one for the embedding scale, and warnings."""
        for role in dict.fromkeys(site.module.role for site in self.sites):
            norms = [s.module for s in self.sites if s.module.role == role and s.module in self.samples]
            if norms:
                self._log_role(role, norms)
        if self.scale_value is not None:
            _info(f"DyT embedding scale {float(self.scale_value):.4g}")
        if not GOOD_GAIN[0] <= self.linear_gain <= GOOD_GAIN[1]:
            _warning(
                f"DyT: linear layers start with gain std*sqrt(hidden) = {self.linear_gain:.2g}, "
                f"runs that train have {GOOD_GAIN[0]} to {GOOD_GAIN[1]}. DyT does not rescale. "
                + self._advice("--init-method-std near 1/sqrt(hidden)")
            )

    def _log_role(self, role: str, norms: list[DyTNorm]) -> None:
        samples = [self.samples[norm] for norm in norms]
        drives = [sample.drive for sample in samples]
        alphas = [float(sample.alpha) for sample in samples]
        fresh = all(
            math.isclose(alpha, norm.alpha_init, rel_tol=_rounding(norm.alpha_init))
            for alpha, norm in zip(alphas, norms, strict=True)
        )
        what = (
            f"alpha0 {alphas[0]:.4g}" if fresh else f"alpha {min(alphas):.3g} to {max(alphas):.3g} (trained)"
        )
        _info(
            f"DyT {role:<5} {len(samples):3d} sites, {what}, "
            f"alpha*std(x) of the first batch {min(drives):.3g} to {max(drives):.3g}"
        )
        low, high = GOOD_ATTENTION if role == "attn" else GOOD_RANGE
        for drive in {min(drives), max(drives)} if fresh else ():
            if not low <= drive <= high:
                _warning(
                    f"DyT {role}: alpha*std(x) = {drive:.3g} is outside {low} to "
                    f"{high}, where runs train. "
                    + self._advice(f"change --dyt-alpha-init-{role} or --dyt-embedding-scale")
                )
        if fresh and norms[0].function == "identity":
            _warning(
                f"DyT {role}: the identity bounds nothing. Deep models diverge, and so do shallow ones at a "
                "high learning rate with a short warm-up, over a running scale too. Leave out "
                "--dyt-function, if this is no trial (docs/long-runs.md#without-the-squash)."
            )

    def _advice(self, change: str) -> str:
        if self.preset == "auto":
            return (
                "--dyt-preset auto, which is in use, trains from its own start: leave out "
                "--dyt-alpha-init-*, --dyt-embedding-scale and --init-method-std, if given."
            )
        return f"Use --dyt-preset auto, or {change}."

    def record(self, iteration: int) -> StatsRecord:
        """The line of the statistics file for a step."""
        sites = [
            SiteRecord(
                name=site.name,
                role=site.module.role,
                layer=site.layer,
                alpha=float(sample.alpha),
                input_std=float(sample.input.std),
                alpha_std=sample.drive,
                saturated=float(sample.input.saturated),
            )
            for site in self.sites
            if (sample := self.samples.get(site.module))
        ]
        record = StatsRecord(iteration=iteration, sites=sites)
        if self.scale_value is not None:
            record["embedding_scale"] = float(self.scale_value)
        return record

    def track(self, record: StatsRecord | None, iteration: int) -> None:
        """Log the statistics of all stages on the last rank, which has TensorBoard and W&B.

        record: this rank's, None where it reports none.
        """
        sender = None if record is None else self.stage
        try:
            texts = ranks.send_to_last(
                f"stats/{iteration}", sender, self.stages, json.dumps(record), _SEND_SECONDS
            )
        except TimeoutError as error:
            self.tracked = False
            what = "DyT's statistics of step %d are not in TensorBoard and W&B, nor later ones: %s"
            _warning(what, iteration, error)
            return
        if texts:
            records: list[StatsRecord] = [json.loads(text) for text in texts]
            sites = [site for each in records for site in each["sites"]]
            scales = [each["embedding_scale"] for each in records if "embedding_scale" in each]
            trackers.log_sites(sites, scales[0] if scales else None, iteration)


def _rounding(alpha: float) -> float:
    """How far an alpha may be from its start by rounding: bfloat16 holds its logarithm to eight bits."""
    return max(0.01, 2**-8 * abs(math.log(alpha)))


def find_embedding_scale(chunks: list[nn.Module]) -> EmbeddingScale | None:
    """The embedding scale, on the rank that has it (not a copy of it)."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return next((each for each in modules if isinstance(each, EmbeddingScale) and not each.is_copy), None)


_active: Monitor | None = None


@wrapper
def wrap_setup[**P](
    original: Callable[P, tuple[list[nn.Module], object, object]], *args: P.args, **kwargs: P.kwargs
) -> tuple[list[nn.Module], object, object]:
    """`training.setup_model_and_optimizer` that starts a monitor on a DyT model.

    It also logs which parts of a model of several keep another norm.
    """
    global _active
    result = original(*args, **kwargs)
    chunks = result[0]
    for chunk in chunks:
        log_other_norms(unwrap(chunk))
    _active = _monitor_of(chunks)
    if _active is not None:
        _active.look()
    return result


@wrapper
def wrap_training_log[R](original: Callable[..., R], *args: object, **kwargs: object) -> R:
    """`training.training_log`, called once per step, that lets the monitor work afterwards."""
    result = original(*args, **kwargs)
    if _active is not None:
        _active.after_step(bound(original, *args, **kwargs).arguments["iteration"])
    return result


def _monitor_of(chunks: list[nn.Module]) -> Monitor | None:
    from megatron.core import parallel_state as mpu
    from megatron.training import get_args

    args = get_args()
    config: TransformerConfig = unwrap(chunks[0]).config
    # In a model of several parts, such as LLaVA, one of them may be DyT.
    if not is_dyt(config) and not find_sites(chunks):
        return None
    stage, stages = mpu.get_pipeline_model_parallel_rank(), args.pipeline_model_parallel_size
    name = "dyt_stats.jsonl" if stages == 1 else f"dyt_stats.stage{stage}.jsonl"
    # Beside the checkpoints; these may be in an object store ("msc://..."), to which nothing can be appended.
    places = (args.save, getattr(args, "metrics_dir", None))
    directory = next((place for place in places if place and "://" not in place), None)
    return Monitor(
        chunks,
        linear_gain=config.init_method_std * config.hidden_size**0.5,
        preset=config.dyt.name if is_dyt(config) else "",
        stats_file=JsonLines(Path(directory) / name, args.iteration) if directory else None,
        interval=getattr(args, "dyt_stats_interval", 0),  # Absent with --yaml-cfg.
        reports=ranks.is_first_of_stage(),
        tracked=bool(args.tensorboard_dir),
        stage=stage,
        stages=stages,
    )
