"""What a rank of a run has, on disk, and the comparison with the run of one process.

A tensor of the model is recorded as the shards that Megatron would write into a checkpoint, by every
rank, replicas too. So a shard knows its place in the full tensor whatever the layout, and a replica
that went its own way is seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Shard:
    """Part of a parameter: `data` is at `place` of a full tensor of `shape`."""

    name: str
    shape: tuple[int, ...]
    place: tuple[slice, ...]
    data: torch.Tensor


# --- in the worker -------------------------------------------------------------------------------


def shards(model: list[Any]) -> list[Shard]:
    """This rank's parameters, copied."""
    with _whole(model):
        return _copies(model)


def _copies(model: list[Any]) -> list[Shard]:
    return [
        Shard(shard.name, shard.shape, shard.place, shard.data.detach().cpu().clone())
        for shard in _parameters(model)
    ]


def set_weights(model: list[Any], weights: dict[str, torch.Tensor] | None) -> None:
    """Give the model these full weights, or without any move its own off their initial values.

    DyT's parameters start equal everywhere, which would hide a mix-up.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for shard in _parameters(model):
            if weights is None:
                size = shard.data.abs().mean() or 0.1
                noise = torch.randn(shard.data.shape, generator=generator).to(shard.data.device)
                shard.data.add_(0.2 * size * noise)
            else:
                shard.data.copy_(weights[shard.name][shard.place])


def gradient_shards(model: list[Any]) -> list[Shard]:
    """This rank's gradients after Megatron has finished them."""
    if is_fsdp(model[0]):
        with _whole(model, gradients=True):
            return [shard for shard in _copies(model) if _learns(shard, model)]
    parameters = [p for chunk in model for p in chunk.parameters()]
    for chunk in model:
        _gather_gradients(chunk)
    return [
        Shard(shard.name, shard.shape, shard.place, _gradient_of(shard.data, parameters).cpu().clone())
        for shard in _parameters(model)
        if _learns(shard, model)
    ]


def _learns(shard: Shard, model: list[Any]) -> bool:
    """Whether it has a gradient: no frozen alpha, and no buffer."""
    from megatron_dyt.mcore.norm_sites import unwrap

    if shard.name.split("[")[0].endswith(("input_rms", "alpha_floor")):
        return False
    return not (unwrap(model[0]).config.dyt.freeze_alpha and shard.name.split("[")[0].endswith("alpha"))


def _gradient_of(part: torch.Tensor, parameters: list[Any]) -> torch.Tensor:
    """The part of a parameter's gradient that is where `part`, a view, is in the parameter.

    To let the parameters' data be the gradients for a moment would be shorter, but a change of `data` to
    another dtype (bf16 to fp32) takes the hooks of overlapped reduction off a parameter, without a word.
    """
    for p in parameters:
        offset = part.data_ptr() - p.data_ptr()
        if 0 <= offset < p.nbytes:
            start = p.main_grad.storage_offset() + offset // p.element_size()
            found: torch.Tensor = p.main_grad.as_strided(part.shape, part.stride(), start)
            return found
    raise AssertionError("a shard is not a view of a parameter")


def is_fsdp(chunk: Any) -> bool:
    """Whether Megatron-FSDP has the chunk's parameters."""
    return bool(chunk.ddp_config.use_megatron_fsdp)


@contextlib.contextmanager
def _whole(model: list[Any], gradients: bool = False) -> Iterator[None]:
    """While it is entered, an FSDP model has whole plain parameters, or their gradients in their place."""
    with contextlib.ExitStack() as put_back:
        for chunk in filter(is_fsdp, model):
            # As reading the state does, so that it does not do so then.
            chunk.module._replace_param_with_distributed_if_needed()
            for name, parameter in chunk.param_and_grad_buffer.optimizer_named_parameters:
                path, _, last = name.rpartition(".")
                module = chunk.module.module.get_submodule(path)
                put_back.callback(module._parameters.__setitem__, last, module._parameters[last])
                whole = _from_all_ranks(parameter, parameter.grad if gradients else parameter)
                module._parameters[last] = torch.nn.Parameter(whole)
        yield


def _from_all_ranks(parameter: Any, part: Any) -> torch.Tensor:
    """The tensor of which this rank has `parameter.megatron_fsdp_slice`, counted flat; None has nothing."""
    shape = parameter.orig_param.shape
    flat = torch.zeros(shape.numel(), device=torch.cuda.current_device())
    if part is not None:
        flat[parameter.megatron_fsdp_slice] = part.to_local().flatten()
    expert = not getattr(parameter.orig_param, "allreduce", True)
    group = parameter.megatron_fsdp_dist_index.get_fsdp_group(is_expert_parallel=expert)
    torch.distributed.all_reduce(flat, group=group)
    return flat.view(shape)


def _gather_gradients(chunk: Any) -> None:
    """With the distributed optimizer a rank has the finished gradient of its part of each bucket only."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
        ranks = group.intra_distributed_optimizer_instance_group
        for bucket in group.buckets:
            mine = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=ranks)


def _parameters(model: list[Any]) -> Iterator[Shard]:
    """This rank's parameters, as views: writing to a shard's data writes to them."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_dyt.mcore.norm_sites import unwrap

    for chunk in map(unwrap, model):
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for item in _leaves(state):
            if isinstance(item, ShardedTensor):
                # Layers and experts are stacked along prepended axes.
                stacked = item.prepend_axis_num
                name = item.key + "".join(f"[{i}]" for i in item.global_offset[:stacked])
                place = tuple(
                    slice(start, start + length)
                    for start, length in zip(item.global_offset[stacked:], item.local_shape, strict=True)
                )
                yield Shard(name, tuple(item.global_shape[stacked:]), place, item.data)


def _leaves(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _leaves(item)
    else:
        yield node


def causal_mask(length: int) -> torch.Tensor:
    """Megatron's attention mask of one sample, bool [1, length, length], True where not to look."""
    return torch.ones(1, length, length).tril() < 0.5


@torch.no_grad()
def logits(model: list[Any]) -> torch.Tensor | None:
    """Logits [batch, sequence, vocabulary] of fixed tokens, on the last pipeline stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from megatron.training import get_args

    args = get_args()
    length, batch = args.seq_length, 2
    here = torch.cuda.current_device()
    tokens = (torch.arange(batch * length).reshape(batch, length) * 7 % args.vocab_size).to(here)
    positions = torch.arange(length).expand(batch, length).to(here)

    def step(_data: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        return chunk(tokens, positions, causal_mask(length)[None].to(here)), lambda output, **_: output

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None] * len(model) if len(model) > 1 else None,
        model=model if len(model) > 1 else model[0],
        num_microbatches=args.pipeline_model_parallel_size,
        seq_length=length,
        micro_batch_size=batch,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not outputs:
        return None
    return gather_from_tensor_model_parallel_region(outputs[0]).detach().float().cpu()


def save(result: dict[str, Any], directory: Path, name: str, rank: int) -> None:
    """Write a rank's result; the file is there only when it is whole."""
    path = directory / f"{name}.{rank}.pt"
    torch.save(result, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


# --- in the tests --------------------------------------------------------------------------------


@dataclass
class Run:
    """All ranks of one case."""

    name: str
    ranks: list[dict[str, Any]]

    def full(self, part: str) -> dict[str, torch.Tensor]:
        """Full tensors of "initial", "gradient" or "final", put together from the ranks' shards."""
        tensors: dict[str, torch.Tensor] = {}
        for shard in self._shards(part):
            empty = torch.full(shard.shape, torch.nan)
            tensors.setdefault(shard.name, empty)[shard.place] = shard.data
        holes = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        assert not holes, f"{self.name}: {part} of {holes} is incomplete or not finite"
        return tensors

    def errors(self, part: str, reference: Run) -> dict[str, float]:
        """For each parameter the largest ||shard - reference|| / ||reference|| of any rank."""
        expected = reference.full(part)
        found = self.full(part)
        assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
        worst = dict.fromkeys(expected, 0.0)
        for shard in self._shards(part):
            full = expected[shard.name]
            assert shard.shape == tuple(full.shape), shard.name
            norm = float(full.norm())
            assert norm > 0, f"{part} of {shard.name} is zero in {reference.name}: nothing is compared"
            error = float((shard.data - full[shard.place]).norm()) / norm
            worst[shard.name] = max(worst[shard.name], error)
        return worst

    def series(self, what: str) -> list[float]:
        """`losses` or `grad_norms`, one a step; all ranks that have them must agree."""
        found = [rank[what] for rank in self.ranks if rank[what]]
        assert found, f"{self.name}: no rank has {what}"
        assert all(each == found[0] for each in found), f"{self.name}: the ranks' {what} differ"
        return list(found[0])

    def logits(self, when: str) -> torch.Tensor:
        """Logits "before" or "after" training; all ranks that have them must agree."""
        found = [rank[f"logits_{when}"] for rank in self.ranks if rank[f"logits_{when}"] is not None]
        for each in found:
            torch.testing.assert_close(each, found[0], rtol=0, atol=1e-6)
        return found[0]

    def _shards(self, part: str) -> Iterator[Shard]:
        for rank in self.ranks:
            yield from rank[part]


def load(directory: Path, name: str) -> Run:
    """The run `name` of a directory. Raises FileNotFoundError when it is not there."""
    files = sorted(directory.glob(f"{name}.*.pt"))
    if not files:
        raise FileNotFoundError(f"no result of {name} in {directory}")
    return Run(name, [torch.load(file, weights_only=False) for file in files])
