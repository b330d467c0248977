"""Training steps of LLaMA-shaped Megatron layers by norm: python benchmarks/model.py [--output DIR]

Each variant is Megatron's own GPTModel, built with the plugin: RMSNorm (torch's, and Transformer Engine's
where that is installed), DyT as one would write it in PyTorch, the same through torch.compile, DyT's
kernels, the same with the residual add fused, Derf. A step is forward, loss and backward of one
micro-batch; the optimizer, equal for all, is left out. Steps of all variants alternate in one process.
Reported are medians and quartiles, tokens per second, and the peak memory of a step beyond what the
models' parameters take.

On a GPU: 4 layers of LLaMA 7B in bf16, 4096 tokens. On a CPU (or with --quick) a small shape. Attention is
torch's scaled_dot_product_attention in all variants without Transformer Engine: Megatron's own writes
the scores out, and beside that the norms would not be seen.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from common_picture import Bar, bars_svg
from common_report import add_output, heading, markdown_table, new_report, save
from common_timing import WallClock, in_turn, summary
from megatron_world import one_process_world
from torch import Tensor


class Shape(NamedTuple):
    """Of the model and its batch."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int
    tokens: int
    sequences: int


LLAMA_7B = Shape(4, 4096, 11008, 32, 32000, 4096, 1)
SMALL = Shape(2, 512, 1376, 8, 4096, 512, 2)


class Variant(NamedTuple):
    """A norm and how it is computed.

    dyt: settings of DyTConfig, or None for RMSNorm. te: Transformer Engine's layers. plain: DyT's sites
    compute the formula in plain PyTorch, "eager" or "compiled".
    """

    name: str
    dyt: dict[str, Any] | None
    te: bool = False
    plain: str = ""


VARIANTS = (
    Variant("rmsnorm torch", None),
    Variant("rmsnorm te", None, te=True),
    Variant("dyt eager", {"fuse_residual": False}, plain="eager"),
    Variant("dyt compiled", {"fuse_residual": False}, plain="compiled"),
    Variant("dyt", {"fuse_residual": False}),
    Variant("dyt fused", {"fuse_residual": True}),
    Variant("derf fused", {"fuse_residual": True, "function": "erf"}),
    Variant("dyt te", {"fuse_residual": True}, te=True),
)
BASELINES = ("rmsnorm torch", "rmsnorm te")


def make_config(shape: Shape, variant: Variant, dtype: torch.dtype) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dyt import DyTConfig

    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        normalization="RMSNorm" if variant.dyt is None else "DyT",
    )
    if variant.dyt is not None:
        config.dyt = DyTConfig.paper(shape.hidden, **variant.dyt)
    return config


def torch_attention(
    config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any
) -> torch.nn.Module:
    """A core attention for Megatron's local spec: causal, torch's fused kernel."""

    class TorchAttention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            # (sequence, batch, heads, channels) -> (sequence, batch, heads * channels)
            batch_first = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            mixed = torch.nn.functional.scaled_dot_product_attention(*batch_first, is_causal=True)
            return mixed.permute(2, 0, 1, 3).flatten(2)

    return TorchAttention()


def make_spec(config: Any, te: bool) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs

    if te:
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = torch_attention
    return spec


def plain_dyt(x: Tensor, alpha: Tensor, weight: Tensor) -> Tensor:
    """DyT as one would write it, with autograd's own backward."""
    return (weight * torch.tanh(alpha * x.float())).to(x.dtype)


def build(shape: Shape, variant: Variant, device: str, dtype: torch.dtype) -> Any:
    """The variant's model on the device, in training mode."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_dyt.mcore.norm_sites import dyt_sites

    # The same weights for every variant.
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    config = make_config(shape, variant, dtype)
    model = GPTModel(
        config,
        make_spec(config, variant.te),
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.tokens,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).to(device=device, dtype=dtype)
    if variant.plain:
        formula = torch.compile(plain_dyt) if variant.plain == "compiled" else plain_dyt
        for _, site in dyt_sites(model):
            site.forward = lambda x, site=site: formula(x, site.effective_alpha(), site.weight)
    return model.train()


def make_step(model: Any, shape: Shape, device: str) -> Callable[[], None]:
    """A function that does forward, loss and backward of one micro-batch; gradients start from none."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.sequences, shape.tokens)
    tokens = torch.randint(shape.vocabulary, size, generator=generator).to(device)
    positions = torch.arange(shape.tokens, device=device).expand(size)
    labels = tokens.roll(-1, 1)

    def step() -> None:
        model(tokens, positions, None, labels=labels).float().mean().backward()
        model.zero_grad(set_to_none=True)

    return step


def working_variants(shape: Shape, device: str, dtype: torch.dtype, compiles: bool, left_out: dict) -> dict:
    """Name -> step of those that run here; the others' reasons go to left_out."""
    steps = {}
    for variant in VARIANTS:
        if variant.plain == "compiled" and not compiles:
            left_out[variant.name] = "torch.compile is off on CPU unless --compile is given"
            continue
        if variant.te and not _has_te():
            left_out[variant.name] = "Transformer Engine is not installed"
            continue
        try:
            step = make_step(build(shape, variant, device, dtype), shape, device)
            step()
        except Exception as error:  # a variant's fault must not end the run
            left_out[variant.name] = f"{type(error).__name__}: {error}"[:200]
        else:
            steps[variant.name] = step
    return steps


def _has_te() -> bool:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError):
        return False
    return torch.cuda.is_available()


def measure(
    steps: dict[str, Callable[[], None]], rounds: int, tokens: int, device: str
) -> list[dict[str, Any]]:
    """One row per variant: step time with quartiles, tokens per second, peak memory of a step (GPU only)."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int] = {}
    clock = WallClock()
    for name, step, counts in in_turn(steps, rounds, 2):
        before = _start_peak(device)
        clock.call(seconds[name] if counts else [], step)
        if before is not None:
            peaks[name] = torch.cuda.max_memory_allocated() - before
    rows = []
    for name, taken in seconds.items():
        times = summary(taken)
        rate = tokens / times["median_us"] * 1e6
        rows.append({"variant": name, "tokens_per_s": rate, "peak_step_bytes": peaks.get(name), **times})
    return rows


def _start_peak(device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def best_baseline(report: dict[str, Any]) -> float:
    """Median of the fastest RMSNorm, in microseconds."""
    return min(row["median_us"] for row in report["results"] if row["variant"] in BASELINES)


def table(report: dict[str, Any]) -> str:
    best = best_baseline(report)
    columns = ("", "step, ms", "quartiles", "tokens/s", "peak of a step, GB", "over the best RMSNorm")
    rows = []
    for row in report["results"]:
        low, median, high = (row[key] / 1e3 for key in ("quartile1_us", "median_us", "quartile3_us"))
        peak = row["peak_step_bytes"]
        memory = "not measured" if peak is None else f"{peak / 1e9:.2f}"
        times = [f"{median:.1f}", f"{low:.1f} to {high:.1f}", f"{row['tokens_per_s']:.0f}", memory]
        rows.append([row["variant"], *times, f"{row['median_us'] / best:.3f}"])
    return markdown_table(columns, rows)


def picture(report: dict[str, Any]) -> str:
    best = best_baseline(report)
    keys = ("median_us", "quartile1_us", "quartile3_us")
    bars = [
        Bar(row["variant"], *(row[key] / best for key in keys), int(row["variant"] in BASELINES))
        for row in report["results"]
    ]
    settings = report["settings"]
    title = f"Training step, {settings['layers']} layers, hidden {settings['hidden']}, {settings['dtype']}"
    return bars_svg(title, "time over the best RMSNorm's median", [("", bars)], reference=1.0, digits=3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="default 4 on a GPU, 2 on a CPU")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps a variant (default 30)")
    parser.add_argument("--quick", action="store_true", help="the small shape on a GPU too")
    parser.add_argument("--compile", action="store_true", help="the compiled variant on a CPU too")
    add_output(parser)
    args = parser.parse_args(argv)
    if args.rounds < 2 or (args.layers is not None and args.layers < 1):
        parser.error("--rounds must be at least 2 and --layers at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SMALL if args.quick or device == "cpu" else LLAMA_7B
    shape = shape._replace(layers=args.layers or shape.layers)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings = shape._asdict() | {"rounds": args.rounds, "dtype": str(dtype).removeprefix("torch.")}
    report = new_report("model", device, settings)
    print(f"{heading(report)}, {shape}")
    with one_process_world(device):
        steps = working_variants(shape, device, dtype, args.compile or device == "cuda", report["left_out"])
        report["results"] = measure(steps, args.rounds, shape.tokens * shape.sequences, device)
    print(table(report))
    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    save(report, picture(report), args.output)


if __name__ == "__main__":
    main()
