"""Activation memory of a transformer layer by norm: python benchmarks/activation_memory.py [--json FILE]

Counts what one layer of a LLaMA keeps for backward: every storage that autograd saves, once, parameters
excepted, as large as it is when forward is over. Megatron's local spec in bf16, attention's inside
recomputed, as flash attention does, and SwiGLU not fused: it keeps 5 tensors of width ffn so, and fused 3,
which megatron_dyt/recipes/memory.py counts. Runs on the CPU. Bytes are no matter of the device, except for
PyTorch's RMSNorm, which on CPUs keeps fp32 copies; so there is also an emulation that keeps what the fused
ones for GPUs do.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dyt import cpu
from megatron_dyt.atomic import write_json

NORM, CORE = "layernorm", "core_attn"


class Case(NamedTuple):
    """A row of the table.

    kind: of norm: fused RMSNorm, PyTorch's RMSNorm, or DyT. fused: with the residual stream.
    """

    name: str
    kind: str
    fused: bool = False
    recomputed: bool = False


CASES = (
    Case("RMSNorm, fused (emulated)", "fused"),
    Case("RMSNorm, PyTorch on CPU", "torch"),
    Case("DyT, residual apart", "DyT"),
    Case("DyT", "DyT", fused=True),
    Case("RMSNorm, output recomputed", "torch", recomputed=True),
    Case("DyT, residual apart, output recomputed", "DyT", recomputed=True),
    Case("DyT, output recomputed", "DyT", fused=True, recomputed=True),
)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and one fp32 per row, as `torch._fused_rms_norm` and Transformer Engine do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, scale, weight = (t.float() for t in ctx.saved_tensors)
        normalized, g = x * scale, dy.float() * weight
        dx = scale * (g - normalized * (g * normalized).mean(-1, keepdim=True))
        return dx.to(dy.dtype), (dy * normalized).flatten(0, -2).sum(0).to(dy.dtype), None


class FusedRMSNorm(nn.Module):
    """`_RMSNorm` as Megatron builds a norm."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]


class Size(NamedTuple):
    """The layer's sizes; `elements` of one activation of width hidden."""

    sequence: int
    batch: int
    hidden: int
    ffn: int
    heads: int

    @property
    def elements(self) -> int:
        return self.sequence * self.batch * self.hidden


def saved_bytes(layer: nn.Module, size: Size) -> Counter[str]:
    """Bytes that a forward pass of `layer` keeps for backward, by dtype."""
    parameters = {p.untyped_storage()._cdata for p in layer.parameters()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    # The layer's input is the layer before's output: it counts where it is saved, as it is nowhere else.
    x = torch.randn(size.sequence, size.batch, size.hidden, dtype=torch.bfloat16, requires_grad=True)
    hidden_mask = torch.triu(torch.ones(size.sequence, size.sequence, dtype=torch.bool), diagonal=1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = layer(x, attention_mask=hidden_mask[None, None])
    counted: Counter[str] = Counter()
    seen = set(parameters)
    for tensor in saved:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen and storage._cdata != hidden_mask.untyped_storage()._cdata:
            seen.add(storage._cdata)
            counted[str(tensor.dtype).removeprefix("torch.")] += storage.nbytes()
    output.sum().backward()  # a layer whose memory was freed too early would fail here
    return counted


def build_layer(case: Case, size: Size, fused_swiglu: bool = False) -> nn.Module:
    """The first of Megatron's local layers for a case."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dyt.config import DyTConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=size.hidden,
        ffn_hidden_size=size.ffn,
        num_attention_heads=size.heads,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=fused_swiglu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=torch.bfloat16,
        bf16=True,
        normalization="DyT" if case.kind == "DyT" else "RMSNorm",
        recompute_granularity="selective",
        recompute_modules=[CORE, NORM] if case.recomputed else [CORE],
        use_cpu_initialization=True,
    )
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    if case.kind == "DyT":
        config.dyt = DyTConfig.paper(size.hidden, fuse_residual=case.fused)
    elif case.kind == "fused":
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = FusedRMSNorm
    layer: nn.Module = TransformerBlock(config, spec).layers[0]
    return layer


def measure(size: Size) -> dict[str, Counter[str]]:
    """Bytes by dtype for every case."""
    return {case.name: saved_bytes(build_layer(case, size), size) for case in CASES}


def table(found: dict[str, Counter[str]], size: Size) -> str:
    """The result as Markdown."""
    lines = [
        "| norm | bf16 | fp32 | all | of fused RMSNorm | s·b·h activations |",
        "|---|---|---|---|---|---|",
    ]
    reference = found[CASES[0].name].total()
    for name, counted in found.items():
        kib = [f"{n / 1024:.0f}" for n in (counted["bfloat16"], counted["float32"], counted.total())]
        ratio, activations = counted.total() / reference, counted.total() / (2 * size.elements)
        lines.append(f"| {name} | {' | '.join(kib)} | {ratio:.3f} | {activations:.3f} |")
    return "\n".join(lines)


def start_world() -> None:
    """Megatron on the CPU, in a world of one process, with the plugin."""
    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    import megatron_dyt

    megatron_dyt.register()
    store = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2752)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the bytes to FILE")
    args = parser.parse_args(argv)
    size = Size(args.sequence, args.batch, args.hidden, args.ffn, args.heads)
    if min(size) < 1 or size.hidden % size.heads:
        parser.error(f"{size}: all sizes must be at least 1, and --hidden a multiple of --heads")
    start_world()
    found = measure(size)
    print(f"KiB that one layer keeps for backward, {size}")
    print(table(found, size))
    if args.json:
        write_json(args.json, {"size": size._asdict(), "bytes": found, "torch": torch.__version__})


if __name__ == "__main__":
    main()
