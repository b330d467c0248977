"""What a trained model of another domain loses as its norms become DyT, and what a short training regains.

    python examples/beyond_llm/convert.py DOMAIN... --seeds 3 --output DIR

trains each domain's model with its own norm, as run.py does at the first of its learning rates, and
converts copies of it: with alpha 0.5 and the norm's weight, and calibrated in sequence on training data. Each
copy, and the model as it is, is then trained on for each of --tune-steps, at the rate of --tune-rates that is
better on the validation data. DIR/converted has a file for each model, which is not trained again;
DIR/converted.md is made of them. docs/beyond-llm.md has figures.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from megatron_dyt import convert_norms
from megatron_dyt.atomic import write_atomically
from megatron_dyt.errors import UserError, run_main

if TYPE_CHECKING:
    from examples.beyond_llm.domain import Data, Domain, Split

CALIBRATION = 64  # examples
# The batches of the further training are others than those before it.
FURTHER = 1000


def main(argv: list[str] | None = None) -> None:
    """Do what is not done yet, and write the table."""
    frame = importlib.import_module("examples.beyond_llm.run")
    options = parse(sys.argv[1:] if argv is None else argv, frame)
    # The sums of several threads differ from machine to machine.
    torch.set_num_threads(1)
    domains, splits = frame.read(options)
    results: dict[str, list[dict[str, Any]]] = {}
    for name, domain in domains.items():
        for seed in range(1, options.seeds + 1):
            asked = settings(name, domain, seed, options)
            make = functools.partial(compare, asked, domain, splits[name])
            path = options.output / "converted" / f"{name}-seed{seed}.json"
            results.setdefault(name, []).append(frame.once(path, asked, make))
            print(f"{name}, seed {seed}: done", flush=True)
    table = frame.needed("table", importlib.import_module, "examples.beyond_llm.table")
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows(domains, results, options.tune_steps, table))
    write_atomically(options.output / "converted.md", text.encode())
    print(text)


def parse(argv: list[str], frame: Any) -> argparse.Namespace:
    parser = frame.common(__doc__)
    add = parser.add_argument
    add("--tune-steps", type=int, nargs="+", default=[20, 100], help="how long each copy is trained on")
    add("--tune-rates", type=float, nargs="+", default=[3e-4, 1e-3], help="the best counts")
    return frame.checked(parser, argv, ("seeds", "steps", "tune_steps"), ("rates", "tune_rates"))


def settings(name: str, domain: Domain, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What a file's figures depend on and can be changed without changing a model."""
    given = {key: getattr(options, key) for key in ("tune_steps", "tune_rates")}
    return {"domain": name, "seed": seed, "rate": domain.rates[0], "steps": domain.steps, **given}


def compare(asked: dict[str, Any], domain: Domain, split: Split) -> dict[str, Any]:
    """{way: {steps of further training: {"loss": on the test data, a metric: ...}}}."""
    frame = importlib.import_module("examples.beyond_llm.run")
    run = frame.Run(asked["domain"], domain.norm, asked["rate"], asked["seed"])
    model = frame.start(run, domain)
    if not math.isfinite(frame.fit(model, domain, split, run.rate, run.seed)[-1]):
        raise UserError(
            f"{run.domain} diverges with {run.norm} at a rate of {run.rate:g}; give a lower --rates"
        )
    found: dict[str, Any] = {}
    for way in ways(domain):
        made = copy.deepcopy(model)
        convert(made, way, domain, split, run.seed)
        found[way] = {"0": measured(made, domain, split)}
        for steps in asked["tune_steps"]:
            tuned = best(made, replace(domain, steps=steps), split, asked["tune_rates"], run.seed + FURTHER)
            found[way][str(steps)] = measured(tuned, domain, split)
    return {"ways": found}


def ways(domain: Domain) -> tuple[str, ...]:
    return (f"{domain.norm}, as it was", "DyT, alpha 0.5", "DyT, calibrated")


def convert(model: nn.Module, way: str, domain: Domain, split: Split, seed: int) -> None:
    if not way.startswith("DyT"):
        return
    frame = importlib.import_module("examples.beyond_llm.run")
    fitted = way == "DyT, calibrated"
    batch = frame.calibration(domain, split.train, CALIBRATION, seed) if fitted else None
    convert_norms(model, batch, select=domain.select, kinds=(domain.norm.lower(),))


def best(model: nn.Module, domain: Domain, split: Split, rates: list[float], seed: int) -> nn.Module:
    """A copy that was trained on, at the rate that is best on the validation data."""
    frame = importlib.import_module("examples.beyond_llm.run")
    copies = [copy.deepcopy(model) for _ in rates]
    for rate, each in zip(rates, copies, strict=True):
        frame.fit(each, domain, split, rate, seed)
    losses = [loss_on(each, domain, split.valid) for each in copies]
    return copies[min(range(len(rates)), key=lambda i: (not math.isfinite(losses[i]), losses[i]))]


def measured(model: nn.Module, domain: Domain, split: Split) -> dict[str, float]:
    """The loss on the test data, and the domain's first metric there."""
    model.eval()
    metric = next(iter(domain.metrics))
    found = domain.evaluate(model, split.test, split)
    return {"loss": loss_on(model, domain, split.test), metric: found[metric]}


@torch.no_grad()
def loss_on(model: nn.Module, domain: Domain, data: Data) -> float:
    return float(domain.loss(model, data, torch.Generator().manual_seed(0)))


def rows(
    domains: dict[str, Domain], results: dict[str, list[Any]], tuned: list[int], table: Any
) -> list[list[str]]:
    """Means over the seeds, with half of the 95 % interval of the loss."""
    points = [0, *sorted(tuned)]
    found = [["domain", "way", *("right after" if p == 0 else f"{p} steps" for p in points)]]
    found.append(["---"] * len(found[0]))
    for name, domain in domains.items():
        metric, (unit, _) = next(iter(domain.metrics.items()))
        for way in ways(domain):
            cells = [[result["ways"][way][str(point)] for result in results[name]] for point in points]
            losses = [table.text(table.interval([each["loss"] for each in cell]), "") for cell in cells]
            means = [statistics.fmean(each[metric] for each in cell) for cell in cells]
            found.append([domain.title, way, *losses])
            found.append(["", f"{metric}{unit and f', {unit}'}", *(f"{mean:.4g}" for mean in means)])
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    run_main(main)
