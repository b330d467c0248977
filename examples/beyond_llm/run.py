"""DyT beside the norms of models that are no language models, trained from scratch on real data.

    python examples/beyond_llm/run.py DOMAIN... --seeds 3 --output DIR

Each domain is a file of this folder (vit, mae, ...). Its model with its own norm, and without it by each
method (`--methods`, `--alpha0`), is trained at every learning rate of the domain and every seed, from the
same weights over the same batches, and reported on the test data at the rate that is best on the validation
data. DIR/runs has a file for each finished run, which is not done again; DIR/table.csv, DIR/table.md,
DIR/DOMAIN.svg and DIR/DOMAIN-samples.png are made of those of this command: they have its domains and methods
alone. Results: docs/beyond-llm.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_dyt import convert_norms
from megatron_dyt.atomic import read_json, write_json
from megatron_dyt.errors import UserError, run_main

if TYPE_CHECKING:
    from examples.beyond_llm.domain import Data, Domain, Split

DOMAINS = ("vit", "mae", "convnext", "resnet", "dit", "wav2vec2", "hyena", "caduceus", "dino")
# DyT; DyT that starts as what is nearest to the norms, on a batch of the training data; those of methods.py.
FITTED = "DyT-fitted"
METHODS = ("DyT", FITTED, "SkipInit", "Fixup", "sigmaReparam")
ALPHA = 0.5
# Where what is imported and what is installed have different names.
PACKAGES = {"sklearn": "scikit-learn"}
WARM_UP = 0.1
LOSS_EVERY = 10


@dataclass(frozen=True)
class Run:
    """One training; `norm` is the model's own one, or one that `chosen` names."""

    domain: str
    norm: str
    rate: float
    seed: int

    def path(self, output: Path) -> Path:
        return output / "runs" / self.domain / f"{self.norm}-lr{self.rate:g}-seed{self.seed}.json"


def main(argv: list[str] | None = None) -> None:
    """Do what is not done yet, and write the tables."""
    options = parse(sys.argv[1:] if argv is None else argv)
    # The sums of several threads differ from machine to machine.
    torch.set_num_threads(1)
    domains, splits = read(options)
    tables = needed("table", importlib.import_module, "examples.beyond_llm.table")
    try_out(domains, chosen(options))
    results: dict[Run, dict[str, Any]] = {}
    for name, domain in domains.items():
        split = splits[name]
        for run in runs(name, domain, [domain.norm, *chosen(options)], options.seeds):
            make = functools.partial(train, run, domain, split)
            results[run] = once(run.path(options.output), settings(run, domain), make)
            print(f"{run.path(Path()).with_suffix('')}: {said(results[run])}", flush=True)
    tables.write(options.output, domains, results)
    print((options.output / "table.md").read_text())


def try_out(domains: dict[str, Domain], norms: Sequence[str]) -> None:
    """Build each model once: a method that does not fit one is an error before hours of training."""
    for name, domain in domains.items():
        for norm in norms:
            if norm != FITTED:  # It fits where DyT does, and takes longer.
                start(Run(name, norm, domain.rates[0], 1), domain)


def read(options: argparse.Namespace) -> tuple[dict[str, Domain], dict[str, Split]]:
    """The domains asked for, with `--steps` and `--rates` if given, and their data."""
    given = {"steps": options.steps, "rates": options.rates and tuple(options.rates)}
    given = {name: value for name, value in given.items() if value}
    domains, splits = {}, {}
    for name in options.domains:
        try:
            domains[name] = replace(load(name), **given)
            splits[name] = needed(name, domains[name].data)
        except UserError as error:
            if not options.skip_missing:
                raise
            domains.pop(name, None)
            print(f"{name} is left out: {error}", file=sys.stderr)
    if not domains:
        raise UserError(f"nothing is left of {', '.join(options.domains)}")
    return domains, splits


def parse(argv: list[str]) -> argparse.Namespace:
    parser = common(__doc__)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=["DyT"], help="beside the model's own norm")
    add("--alpha0", type=float, nargs="+", default=[ALPHA], help="of DyT, which is trained with each")
    options = checked(parser, argv, counts=("seeds", "steps"), sizes=("rates", "alpha0"))
    if options.alpha0 != [ALPHA] and "DyT" not in options.methods:
        parser.error(f"--alpha0 is DyT's, which is not among --methods {' '.join(options.methods)}; add it")
    return options


def common(description: str) -> argparse.ArgumentParser:
    """The flags that `read` needs."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add = parser.add_argument
    add("domains", nargs="+", metavar="DOMAIN", choices=DOMAINS, help=", ".join(DOMAINS))
    add("--seeds", type=int, default=3, help="how many")
    add("--steps", type=int, help="of each run; default: the domain's")
    add("--rates", type=float, nargs="+", help="peaks of the learning rate; default: the domain's")
    add("--skip-missing", action="store_true", help="leave out domains whose package is not installed")
    add("--output", type=Path, required=True, metavar="DIR")
    return parser


def checked(
    parser: argparse.ArgumentParser, argv: list[str], counts: Sequence[str], sizes: Sequence[str]
) -> argparse.Namespace:
    """The flags given; `counts` have to be 1 at least, `sizes` finite and above 0."""
    options = parser.parse_args(argv)
    for name in (*counts, *sizes):
        given = getattr(options, name)
        flag = f"--{name.replace('_', '-')}"
        for value in given if isinstance(given, list) else [given] * (given is not None):
            if name in counts and value < 1:
                parser.error(f"{flag} {value}: 1 is the least")
            if not 0 < value < math.inf:
                parser.error(f"{flag} {value}: it has to be finite and above 0")
    return options


def chosen(options: argparse.Namespace) -> list[str]:
    """What is trained beside the model's own norm: "DyT" and "DyT-alpha2", say."""
    alphas = ["" if alpha == ALPHA else f"-alpha{alpha:.15g}" for alpha in options.alpha0]
    names = [f"{each}{alpha}" for each in options.methods for alpha in (alphas if each == "DyT" else [""])]
    return list(dict.fromkeys(names))


def method_of(norm: str) -> tuple[str, float | None]:
    """One of `METHODS`, or a model's own norm; and the initial alpha of DyT."""
    method, _, alpha = norm.partition("-alpha")
    return method, float(alpha or ALPHA) if method == "DyT" else None


def load(name: str) -> Domain:
    """The domain of a file of this folder."""
    return needed(name, importlib.import_module, f"examples.beyond_llm.{name}").DOMAIN


def needed(what: str, make: Any, *arguments: Any) -> Any:
    """`make(*arguments)`; a package that is missing is a `UserError` that says how to get it."""
    try:
        return make(*arguments)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        package = PACKAGES.get(module, module)
        raise UserError(f"{what} needs {package}, which is not installed: pip install {package}") from error


def runs(name: str, domain: Domain, norms: Sequence[str], seeds: int) -> list[Run]:
    """Seed by seed, so that a part of them is a comparison too."""
    return [
        Run(name, norm, rate, seed) for seed in range(1, seeds + 1) for rate in domain.rates for norm in norms
    ]


def said(result: dict[str, Any]) -> str:
    if result["status"] == "diverged":
        return f"diverged after {result['steps']} steps"
    return ", ".join(f"{name} {value:.4g}" for name, value in result["test"].items())


def once(path: Path, asked: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives with the settings `asked`, from its file if that is there."""
    found = read_json(path)
    if found is None:
        found = {"settings": asked, **make()}
        write_json(path, found)
    elif found["settings"] != asked:
        raise UserError(f"{path} has the settings {found['settings']}, not {asked}; choose another --output")
    return found


def settings(run: Run, domain: Domain) -> dict[str, Any]:
    """What a run's result depends on and can be changed without changing a model."""
    recipe = {"steps": domain.steps, "batch": domain.batch, "weight_decay": domain.weight_decay}
    return {**vars(run), **recipe, "betas": list(domain.betas), "alpha": method_of(run.norm)[1]}


def start(run: Run, domain: Domain, data: Data | None = None) -> nn.Module:
    """The model with the run's norm, or without by its method; its other weights depend on the seed alone.

    Args:
        data: to train on; for what is fitted to it.
    """
    torch.manual_seed(run.seed)
    model = domain.model()
    method, alpha = method_of(run.norm)
    if method == FITTED:
        batch = calibration(domain, data or domain.data().train, domain.batch, run.seed)
        convert_norms(model, batch, refine=False, select=domain.select, kinds=(domain.norm.lower(),))
    elif alpha is not None:
        convert_norms(model, alpha_init=alpha, select=domain.select, kinds=(domain.norm.lower(),))
    elif method != domain.norm:
        importlib.import_module("examples.beyond_llm.methods").METHODS[method](model)
    if domain.adapt is not None:
        domain.adapt(model, method)
    return model


def calibration(domain: Domain, data: Data, count: int, seed: int) -> Tensor | dict[str, Any]:
    """What a model is called with, of `count` examples that the seed chooses."""
    generator = torch.Generator().manual_seed(seed)
    batch = data.batch(generator, count)
    return batch.inputs if domain.call is None else domain.call(batch, generator)


def train(run: Run, domain: Domain, split: Split) -> dict[str, Any]:
    """Mean losses of each `LOSS_EVERY` steps, and the metrics; or where the loss was no number."""
    began = time.perf_counter()
    model = start(run, domain, split.train)
    losses = fit(model, domain, split, run.rate, run.seed)
    if not math.isfinite(losses[-1]):
        return {"status": "diverged", "steps": len(losses), "losses": means(losses[:-1])}
    valid, test = (domain.evaluate(model, data, split) for data in (split.valid, split.test))
    if not all(math.isfinite(value) for value in (*valid.values(), *test.values())):
        return {"status": "diverged", "steps": domain.steps, "losses": means(losses)}
    seconds = round(time.perf_counter() - began, 1)
    pictures = {} if domain.samples is None else {"samples": rounded(domain.samples(model))}
    return {
        "status": "done",
        "valid": valid,
        "test": test,
        "losses": means(losses),
        "seconds": seconds,
        "torch": torch.__version__,
        **pictures,
    }


def fit(model: nn.Module, domain: Domain, split: Split, rate: float, seed: int) -> list[float]:
    """Train for the domain's steps, and leave the model in eval mode; each step's loss.

    It ends with the first loss that is no number.
    """
    model.train()
    # The dropout's of a model that has one; the batches' and the loss's is a generator of their own.
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = make_optimizer(model, domain)
    losses: list[float] = []
    for step in range(domain.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, domain.steps)
        loss = domain.loss(model, split.train.batch(generator, domain.batch), generator)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if domain.after is not None:
            domain.after(model, (step + 1) / domain.steps)
    model.eval()
    return losses


def make_optimizer(model: nn.Module, domain: Domain) -> torch.optim.Optimizer:
    """AdamW; gains, biases and alpha are not decayed, as in the paper's ImageNet code."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": domain.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=domain.betas)


def schedule(step: int, steps: int) -> float:
    """The share of the peak rate: linear warm-up, then a cosine to 0."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def rounded(pictures: Tensor) -> list[Any]:
    return pictures.double().mul(100).round().div(100).tolist()


def means(losses: Sequence[float]) -> list[float]:
    parts = [losses[i : i + LOSS_EVERY] for i in range(0, len(losses), LOSS_EVERY)]
    return [sum(part) / len(part) for part in parts]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    run_main(main)
