"""The paper's efficiency tables: python benchmarks/hf_model.py [--output DIR]

A Hugging Face LLaMA-7B-shaped model with RMSNorm, with DyT (this project's operator, and the formula in
plain PyTorch as the paper had it), and with identities in their place; inference and training, compiled
and not. As in arXiv 2503.10622, section 5 and its appendix: seconds for 100 passes of one sequence of 4096
tokens, of the whole model and of its 2 L + 1 norm layers alone. The variants share every weight but the
norms' and alternate pass by pass in one process; 100 passes are 100 times the median.

On a CPU (or with --quick) a small model, not compiled unless --compile is given.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from common_picture import Bar, bars_svg
from common_report import add_output, heading, markdown_table, new_report, save, save_figures
from common_timing import WallClock, in_turn, summary
from torch import Tensor, nn

from megatron_dyt.nn import DynamicTanh

PASSES = 100
MODES = ("inference", "training")
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "vocab_size": 4096}


class PlainDyT(nn.Module):
    """DyT without bias in plain PyTorch, as in the paper's LLaMA."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x)


# None keeps the model's RMSNorm.
VARIANTS: dict[str, Callable[[int], nn.Module] | None] = {
    "rmsnorm": None,
    "dyt": lambda hidden: DynamicTanh(hidden, bias=False),
    "dyt plain": PlainDyT,
    "identity": lambda hidden: nn.Identity(),
}


def make_model(shape: dict[str, int], layers: int, tokens: int, device: str, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **shape,
        num_hidden_layers=layers,
        num_key_value_heads=shape["num_attention_heads"],
        max_position_embeddings=tokens,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


def with_norms(
    model: nn.Module, make: Callable[[int], nn.Module] | None
) -> tuple[nn.Module, list[nn.Module]]:
    """A model that shares all parameters but the norms', and its norms, in the order they run."""
    hidden = model.config.hidden_size
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    shared = {id(p): p for p in model.parameters()}
    twin = copy.deepcopy(model, shared)
    slots = [
        (layer, name)
        for layer in twin.model.layers
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    slots.append((twin.model, "norm"))
    if make is not None:
        for owner, name in slots:
            setattr(owner, name, make(hidden).to(device=device, dtype=dtype))
    return twin, [getattr(owner, name) for owner, name in slots]


def model_pass(model: Callable[..., Any], tokens: Tensor, mode: str) -> Callable[[], None]:
    """One forward pass, in training with the loss and the backward pass."""

    def infer() -> None:
        with torch.no_grad():
            model(input_ids=tokens)

    def train() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    return infer if mode == "inference" else train


def layers_pass(norms: list[Callable[[Tensor], Tensor]], x: Tensor, mode: str) -> Callable[[], None]:
    """All norm layers one after another, each on an input of the model's size."""

    def infer() -> None:
        with torch.no_grad():
            for norm in norms:
                norm(x)

    def train() -> None:
        leaf = x.detach().requires_grad_()
        for norm in norms:
            y = norm(leaf)
            if y is not leaf:  # an identity computes nothing, forward or backward
                y.backward(x)

    return infer if mode == "inference" else train


def measure(passes: dict[str, Callable[[], None]], rounds: int, parameters: list[Tensor]) -> dict[str, Any]:
    """Variant -> time of a pass; gradients start from none."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    clock = WallClock()
    for name, run, counts in in_turn(passes, rounds, 3):
        clock.call(seconds[name] if counts else [], run)
        for parameter in parameters:
            parameter.grad = None
    return {name: summary(taken) for name, taken in seconds.items()}


def why_eager(device: str) -> str:
    """Why nothing is compiled; on a GPU all is by default."""
    if device == "cuda":
        return "--no-compile was given"
    return "torch.compile is off on CPU unless --compile is given"


def measure_all(args: argparse.Namespace, shape: dict[str, int], device: str, report: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    base = make_model(shape, args.layers, args.tokens, device, dtype)
    twins = {name: with_norms(base, make) for name, make in VARIANTS.items()}
    parameters = list({id(p): p for model, _ in twins.values() for p in model.parameters()}.values())
    tokens = torch.randint(shape["vocab_size"], (1, args.tokens), device=device)
    x = torch.randn(1, args.tokens, shape["hidden_size"], device=device, dtype=dtype)
    for compiled in (True,) if args.only_compiled else (False, True):
        if compiled and not args.compile:
            report["left_out"]["compiled"] = why_eager(device)
            continue
        # Each layer's norm and each model gets code of its own; past the limit it would run eagerly.
        torch._dynamo.config.recompile_limit = 4 * (2 * args.layers + 1)
        wrap: Any = torch.compile if compiled else lambda module: module
        models = {name: wrap(model) for name, (model, _) in twins.items()}
        norms = {name: [wrap(norm) for norm in found] for name, (_, found) in twins.items()}
        for mode in MODES:
            of_model = {name: model_pass(model, tokens, mode) for name, model in models.items()}
            of_layers = {name: layers_pass(found, x, mode) for name, found in norms.items()}
            model_times = measure(of_model, args.rounds, parameters)
            layer_times = measure(of_layers, args.rounds, parameters)
            for name in VARIANTS:
                row = {"variant": name, "mode": mode, "compiled": compiled}
                report["results"].append(row | {"layers": layer_times[name], "model": model_times[name]})
            save_figures(report, args.output)  # What is measured stays when the time is over.


def seconds_for_all(times: dict[str, float], key: str = "median_us") -> float:
    """Of PASSES passes."""
    return PASSES * times[key] / 1e6


def table(report: dict[str, Any]) -> str:
    columns = (
        "",
        "mode",
        "compiled",
        f"norm layers, s for {PASSES} passes",
        "model, s",
        "quartiles of the model",
    )
    rows = []
    for row in report["results"]:
        low, high = (seconds_for_all(row["model"], key) for key in ("quartile1_us", "quartile3_us"))
        times = [f"{seconds_for_all(row[part]):.2f}" for part in ("layers", "model")]
        compiled = "yes" if row["compiled"] else "no"
        rows.append([row["variant"], row["mode"], compiled, *times, f"{low:.2f} to {high:.2f}"])
    return markdown_table(columns, rows)


def picture(report: dict[str, Any]) -> str:
    groups: dict[str, list[Bar]] = {}
    for row in report["results"]:
        values = [seconds_for_all(row["model"], k) for k in ("median_us", "quartile1_us", "quartile3_us")]
        name = f"{row['mode']}, {'compiled' if row['compiled'] else 'not compiled'}"
        groups.setdefault(name, []).append(Bar(row["variant"], *values, list(VARIANTS).index(row["variant"])))
    settings = report["settings"]
    title = (
        f"LLaMA of {settings['layers']} layers, hidden {settings['hidden_size']}, {settings['tokens']} tokens"
    )
    return bars_svg(title, f"seconds for {PASSES} passes", list(groups.items()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="default 32 on a GPU, 2 on a CPU")
    parser.add_argument("--tokens", type=int, help="default 4096 on a GPU, 512 on a CPU")
    parser.add_argument(
        "--rounds", type=int, help="timed passes a variant (default 100 on a GPU, 20 on a CPU)"
    )
    parser.add_argument("--quick", action="store_true", help="the small model on a GPU too")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default on a GPU only")
    parser.add_argument("--only-compiled", action="store_true", help="not the passes that are not compiled")
    add_output(parser)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = args.quick or device == "cpu"
    args.layers = args.layers or (2 if small else 32)
    args.tokens = args.tokens or (512 if small else 4096)
    args.rounds = args.rounds or (20 if small else 100)
    args.compile = device == "cuda" or args.only_compiled if args.compile is None else args.compile
    if args.rounds < 2 or min(args.layers, args.tokens) < 1:
        parser.error("--rounds must be at least 2, --layers and --tokens at least 1")
    shape = SMALL if small else LLAMA_7B
    settings = shape | {name: getattr(args, name) for name in ("layers", "tokens", "rounds")}
    report = new_report("hf_model", device, settings)
    print(f"{heading(report)}, {settings}")
    measure_all(args, shape, device, report)
    print(table(report))
    for name, reason in report["left_out"].items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    save(report, picture(report), args.output)


if __name__ == "__main__":
    main()
