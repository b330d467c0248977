"""The models of other domains: what becomes DyT, that it computes DyT, and how the comparison runs."""

import copy
import csv
import functools
import importlib.util
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from examples.beyond_llm import run as frame
from examples.beyond_llm.domain import Data, Domain, Split
from megatron_dyt import convert_norms
from megatron_dyt.errors import UserError
from tests.examples import made_up
from tests.shaken import shaken

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("small_data")

# The one domain with a library of its own, which is no dependency.
DIFFUSERS = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="no diffusers")
NAMES = [pytest.param(name, marks=DIFFUSERS) if name == "dit" else name for name in frame.DOMAINS]
BLOCKS = [f"layers.{i}.layernorm_{place}" for i in range(4) for place in ("before", "after")]
ENCODER = [f"vit.{name}" for name in (*BLOCKS, "layernorm")]
SITES = {
    "vit": ENCODER,
    "mae": [
        *ENCODER,
        *(f"decoder.decoder_layers.0.layernorm_{place}" for place in ("before", "after")),
        "decoder.decoder_norm",
    ],
    "convnext": [
        "convnext.embeddings.layernorm",
        *(f"convnext.encoder.stages.0.layers.{i}.layernorm" for i in range(2)),
        "convnext.encoder.stages.1.downsampling_layer.0",
        *(f"convnext.encoder.stages.1.layers.{i}.layernorm" for i in range(2)),
        "convnext.layernorm",
    ],
    "dit": [
        *(f"transformer_blocks.{i}.{name}" for i in range(4) for name in ("norm1.norm", "norm3")),
        "norm_out",
    ],
    "wav2vec2": [
        "wav2vec2.feature_projection.layer_norm",
        *(f"wav2vec2.encoder.layers.{i}.{place}layer_norm" for i in range(4) for place in ("", "final_")),
        "wav2vec2.encoder.layer_norm",
    ],
    "caduceus": ["mamba.layers.0.norm", "mamba.layers.1.norm", "mamba.norm_f"],
    "hyena": ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"],
}
# Modules of this project, saved as torch saves any.
NO_LIBRARY = ("hyena", "caduceus", "dino")
SITES["dino"] = [
    f"{part}.vit.{name}" for part in ("student", "teacher") for name in (*BLOCKS[:4], "layernorm")
]
RESNET_BLOCKS = [f"resnet.encoder.stages.{stage}.layers.{i}" for stage in range(2) for i in range(2)]
SITES["resnet"] = [
    "resnet.embedder.embedder.normalization",
    "resnet.encoder.stages.1.layers.0.shortcut.normalization",
    *(f"{block}.layer.{i}.normalization" for block in RESNET_BLOCKS for i in range(2)),
]
CHANNELS_FIRST = {
    "convnext.embeddings.layernorm",
    "convnext.encoder.stages.1.downsampling_layer.0",
    *SITES["resnet"],
}


class PlainDyT(nn.Module):
    """weight · tanh(alpha · x) + bias from torch's own operations; `dim` is that of the channels."""

    def __init__(self, channels: int, dim: int, bias: bool) -> None:
        super().__init__()
        self.dim = dim
        self.alpha = nn.Parameter(torch.tensor([0.5]))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        moved = x.movedim(self.dim, -1)
        bias = 0.0 if self.bias is None else self.bias
        return (self.weight * (self.alpha * moved).tanh() + bias).movedim(-1, self.dim)


def made(name: str, norm: str, seed: int = 1) -> nn.Module:
    domain = frame.load(name)
    return frame.start(frame.Run(name, norm, domain.rates[0], seed), domain)


@pytest.mark.parametrize("name", NAMES)
def test_sites_values_and_gradients(name: str) -> None:
    domain, found = frame.load(name), made(name, "DyT").double()
    expected = made(name, domain.norm).double()
    dyts = [site for site, module in found.named_modules() if hasattr(module, "alpha")]
    assert sorted(dyts) == sorted(SITES[name])
    for site in SITES[name]:
        dyt, dim = found.get_submodule(site), 1 if site in CHANNELS_FIRST else -1
        expected.set_submodule(site, PlainDyT(len(dyt.weight), dim, dyt.bias is not None).double())
    expected.load_state_dict(shaken(found).state_dict())
    data = domain.data().train
    inputs = data.inputs[:8]
    batch = Data(inputs.double() if inputs.is_floating_point() else inputs, data.targets[:8])
    losses = [domain.loss(m, batch, torch.Generator().manual_seed(5)) for m in (found, expected)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    for loss in losses:
        loss.backward()
    reference = dict(expected.named_parameters())
    trained = [site for site in SITES[name] if not site.startswith("teacher.")]
    assert all(found.get_parameter(f"{site}.alpha").grad.abs().sum() > 0 for site in trained)
    for parameter_name, parameter in found.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad,
                reference[parameter_name].grad,
                rtol=1e-8,
                atol=1e-12,
                msg=lambda text, name=parameter_name: f"{name}: {text}",
            )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_LIBRARY])
def test_saved_and_loaded_by_its_library(name: str, tmp_path: Path) -> None:
    domain = frame.load(name)
    model = made(name, "DyT").eval()
    with torch.no_grad():
        for site in SITES[name]:
            model.get_submodule(site).alpha += 0.25

    class Converted(type(model)):  # type: ignore[misc]
        @functools.wraps(type(model).__init__)  # diffusers reads the arguments' names.
        def __init__(self, *args, **config) -> None:  # type: ignore[no-untyped-def]
            super().__init__(*args, **config)
            convert_norms(self, select=domain.select, kinds=(domain.norm.lower(),))
            if name == "resnet":  # Its pooling is taken out after it is made: no configuration can say so.
                self.resnet.embedder.pooler = nn.Identity()

    model.save_pretrained(tmp_path)
    loaded = Converted.from_pretrained(tmp_path).eval()
    batch = domain.data().valid
    losses = [domain.loss(each, batch, torch.Generator().manual_seed(5)) for each in (model, loaded)]
    assert torch.equal(*losses)


def test_norms_start_alike() -> None:
    base, dyt, other = made("vit", "LayerNorm"), made("vit", "DyT"), made("vit", "DyT", seed=2)
    weights = dyt.state_dict()
    shared = {key: value for key, value in base.state_dict().items() if key in weights}
    assert set(weights) - set(shared) == {f"{site}.alpha" for site in SITES["vit"]}
    assert all(torch.equal(value, weights[key]) for key, value in shared.items())
    assert not torch.equal(weights["classifier.weight"], other.state_dict()["classifier.weight"])
    assert all(weights[f"{site}.alpha"].item() == 0.5 for site in SITES["vit"])


@pytest.mark.parametrize("name", ["vit", "wav2vec2"])
def test_a_fitted_start_does_what_the_norms_do(name: str) -> None:
    domain = frame.load(name)
    split, run = domain.data(), frame.Run(name, frame.FITTED, 1e-3, 1)
    batch = frame.calibration(domain, split.valid, 8, seed=3)
    last = []
    models = [made(name, norm) for norm in (domain.norm, "DyT")]
    models += [frame.start(run, domain, split.train) for _ in range(2)]
    for model in models:
        site = model.eval().get_submodule(SITES[name][-1])
        site.register_forward_hook(lambda _, __, output: last.append(output.detach()))
        model(**batch) if isinstance(batch, dict) else model(batch)
    norms, plain, fitted, again = last
    assert torch.equal(fitted, again)
    assert (fitted - norms).square().mean() < 0.5 * (plain - norms).square().mean()
    weights = models[2].state_dict()
    rest = [key for key in weights if key.rpartition(".")[0] not in SITES[name]]
    assert all(torch.equal(weights[key], models[0].state_dict()[key]) for key in rest)


@pytest.mark.parametrize("name", ["vit", "mae"])
def test_patches_start_with_the_variance_of_pixels(name: str) -> None:
    """Of independent pixels; those of digits are alike, which makes it more."""
    projection = made(name, "DyT").get_submodule("vit.embeddings.patch_embeddings.projection")
    pixels = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert 0.8 < projection(pixels).std() < 1.2


# --- the frame, on a domain of its own --------------------------------------------------------------


class Recorder:
    """A domain whose loss notes the batches that it gets."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.bad_after = math.inf

    def loss(self, model: nn.Module, batch: Data, generator: torch.Generator) -> torch.Tensor:
        self.batches.append(batch.inputs[:, 0].tolist())
        loss = (model(batch.inputs) - batch.targets).square().mean()
        return loss * math.nan if len(self.batches) > self.bad_after else loss

    def domain(self) -> Domain:
        inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
        data = Data(inputs, inputs[:, :1])
        return Domain(
            title="line",
            metrics={"error": ("", False)},
            model=lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1)),
            data=lambda: Split(data, data, data),
            loss=self.loss,
            evaluate=lambda model, data, split: {
                "error": float((model(data.inputs) - data.targets).detach().std())
            },
            rates=(1e-3, 1e-2),
            steps=12,
            batch=8,
        )


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    from examples.beyond_llm import table

    recorder = Recorder()
    paper = tmp_path / "paper.yaml"
    row = {"model": "L", "LN": 1.5, "DyT": 1.25}
    facts = {"ours": "error", "metric": "err", "unit": "m", "table": "Table 0", "rows": [row]}
    facts["compared"] = [{"table": "Table 9", "rows": [{"model": "L", "LN": 1.75}]}]
    paper.write_text(yaml.safe_dump({"domains": {"vit": facts}}))
    monkeypatch.setattr(table, "PAPER", paper)
    monkeypatch.setattr(frame, "load", lambda name: recorder.domain())
    return recorder


def run(output: Path, *more: str) -> None:
    frame.main(["vit", "--output", str(output), *more])


def test_tables_and_resume(line: Recorder, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(output, "--seeds", "2")
    # Two seeds, two rates and two norms; the norms see the same batches, the seeds others.
    each = [line.batches[i : i + 12] for i in range(0, 8 * 12, 12)]
    assert len(line.batches) == 8 * 12
    assert each[0] == each[1] == each[2] == each[3] != each[4] == each[5]
    files = sorted((output / "runs/vit").glob("*.json"))
    assert len(files) == 8
    table = (output / "table.md").read_text()
    papers = [line.split("|")[-2].strip() for line in table.splitlines()[2:]]
    assert papers == ["err, m: L 1.5 (Table 0); L 1.75 (Table 9)", "err, m: L 1.25 (Table 0)"]
    done = {
        norm: [json.loads((output / f"runs/vit/{norm}-lr0.01-seed{s}.json").read_text()) for s in (1, 2)]
        for norm in ("LayerNorm", "DyT")
    }
    differences = [d["test"]["error"] - b["test"]["error"] for b, d in zip(*done.values(), strict=True)]
    with (output / "table.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["norm"] == "DyT")
    mean, half = (float(row[key]) for key in ("minus own norm", "half interval of the difference"))
    assert mean == pytest.approx(sum(differences) / 2)
    # Of two numbers: Student's t with one degree of freedom is 12.706.
    assert half == pytest.approx(12.706 * abs(differences[1] - differences[0]) / 2, rel=1e-4)
    assert "line" in (output / "vit.svg").read_text()

    files[3].unlink()
    files[5].write_text("{")
    line.batches.clear()
    run(output, "--seeds", "2")
    assert len(line.batches) == 2 * 12
    assert (output / "table.md").read_text() == table
    with pytest.raises(UserError, match=r"'steps': 12.*'steps': 5.*choose another --output"):
        run(output, "--steps", "5")


def test_a_method_that_does_not_fit_is_refused_before_any_training(line: Recorder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Sequential has no layers"):
        run(tmp_path, "--methods", "DyT", "DyT-fitted", "Fixup")
    assert not line.batches


def test_a_run_that_diverges_is_recorded(line: Recorder, tmp_path: Path) -> None:
    # The first run, LayerNorm's at the lower rate, goes on; DyT's stops at its third step, as all after it.
    line.bad_after = 14
    run(tmp_path, "--seeds", "1")
    result = json.loads((tmp_path / "runs/vit/DyT-lr0.001-seed1.json").read_text())
    assert (result["status"], result["steps"], len(result["losses"])) == ("diverged", 3, 1)
    row = (tmp_path / "table.md").read_text().splitlines()[-1]
    assert re.search(r"\| line \| error \| DyT \| 0.001 \| diverged \| none \| 1 \|", row)
    assert "vit,error,,DyT,0.001,0,1,,," in (tmp_path / "table.csv").read_text()


@pytest.mark.parametrize(
    ("name", "package", "missing"),
    [
        ("vit", "scikit-learn", ("sklearn", "sklearn.datasets")),
        ("dit", "diffusers", ("diffusers",)),
        ("dino", "mlxtend", ("mlxtend",)),
    ],
)
def test_a_missing_package(
    name: str, package: str, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in [name for name in sys.modules if name.startswith("examples.beyond_llm.")]:
        file = module.rpartition(".")[2]
        if file not in ("run", "domain"):
            monkeypatch.delitem(sys.modules, module)
            monkeypatch.delattr(sys.modules["examples.beyond_llm"], file, raising=False)
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name} needs {package}.*pip install {package}"):
        frame.main([name, "--output", str(tmp_path)])


def test_samples_in_a_picture(line: Recorder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from examples.beyond_llm import table

    drawn = []
    monkeypatch.setattr(table, "mosaic", lambda pictures, edge: drawn.append(pictures) or np.ones((2, 2)))
    made = torch.arange(16.0).reshape(1, 2, 2, 4)
    domain = replace(line.domain(), samples=lambda model: made if model is None else made + model[0].bias[0])
    monkeypatch.setattr(frame, "load", lambda name: domain)
    run(tmp_path, "--seeds", "2")
    assert (tmp_path / "vit-samples.png").read_bytes().startswith(b"\x89PNG")
    chosen = [
        frame.Run("vit", norm, rate, 1)
        for norm, rate in zip(("LayerNorm", "DyT"), best(tmp_path), strict=True)
    ]
    stored = [json.loads(each.path(tmp_path).read_text())["samples"] for each in chosen]
    assert [pictures.tolist() for pictures in drawn] == [made.tolist(), *stored]
    assert stored[0] != stored[1]


def best(output: Path) -> list[float]:
    with (output / "table.csv").open() as file:
        return [float(row["learning rate"]) for row in csv.DictReader(file)]


def test_a_mosaic_has_each_picture_at_its_place() -> None:
    from examples.beyond_llm import table

    pictures = np.arange(24.0).reshape(2, 3, 2, 2)
    found = table.mosaic(pictures, -1.0)
    assert found.shape == (6, 9)
    for row in range(2):
        for column in range(3):
            part = found[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            assert (part[:2, :2] == pictures[row, column]).all()
            assert (part[2] == -1).all()
            assert (part[:, 2] == -1).all()


def test_missing_domains_are_left_out(
    line: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(name: str) -> Domain:
        if name == "mae":
            raise UserError("mae needs a package")
        return recorded

    recorded = line.domain()
    monkeypatch.setattr(frame, "load", load)
    names, options = ["mae", "vit"], ["--seeds", "1", "--output", str(tmp_path)]
    with pytest.raises(UserError, match="mae needs a package"):
        frame.main([*names, *options])
    frame.main([*names, *options, "--skip-missing"])
    assert "mae is left out: mae needs a package" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["vit"]
    monkeypatch.setattr(
        frame, "load", lambda name: replace(recorded, data=lambda: made_up.missing("no recordings"))
    )
    with pytest.raises(UserError, match="nothing is left of vit"):
        frame.main(["vit", *options, "--skip-missing"])
    assert "vit is left out: no recordings" in capsys.readouterr().err


def test_rates_and_steps_of_the_command_line(line: Recorder, tmp_path: Path) -> None:
    run(tmp_path, "--seeds", "1", "--steps", "3", "--rates", "5e-3")
    files = sorted(path.name for path in (tmp_path / "runs/vit").iterdir())
    assert files == ["DyT-lr0.005-seed1.json", "LayerNorm-lr0.005-seed1.json"]
    assert len(line.batches) == 2 * 3


def test_initial_alphas_are_trained_side_by_side(line: Recorder, tmp_path: Path) -> None:
    run(tmp_path, "--seeds", "1", "--rates", "1e-3", "--alpha0", "0.5", "2", "0.5")
    files = sorted(path.name for path in (tmp_path / "runs/vit").iterdir())
    assert files == [f"{name}-lr0.001-seed1.json" for name in ("DyT-alpha2", "DyT", "LayerNorm")]
    results = [json.loads((tmp_path / "runs/vit" / name).read_text()) for name in files]
    assert [result["settings"]["alpha"] for result in results] == [2.0, 0.5, None]
    assert results[0]["losses"] != results[1]["losses"]
    table = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [row.split("|")[3].strip() for row in table] == ["LayerNorm", "DyT", "DyT-alpha2"]


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--seeds", "0", "--seeds 0: 1 is the least"),
        ("--steps", "0", "--steps 0: 1 is the least"),
        ("--rates", "nan", "--rates nan: it has to be finite and above 0"),
        ("--alpha0", "-1", "--alpha0 -1.0: it has to be finite and above 0"),
        ("--methods", "ReZero", "invalid choice: 'ReZero'"),
    ],
)
def test_impossible_values(
    flag: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, flag, value)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_settings(name: str) -> None:
    paper = yaml.safe_load((Path(frame.__file__).parent / "paper.yaml").read_text())
    assert paper["alpha0"] == frame.ALPHA
    assert set(paper["domains"]) == set(frame.DOMAINS)
    assert paper["domains"][name]["ours"] in frame.load(name).metrics


def test_features_are_of_the_whole_image() -> None:
    """The linear probe sees every patch: each changes the features."""
    from examples.beyond_llm import mae

    model = made("mae", "LayerNorm").eval()
    images = torch.zeros(17, 1, 8, 8)
    for patch in range(16):
        images[patch, 0, 2 * (patch // 4), 2 * (patch % 4)] = 1.0
    found = mae.features(model, images)
    assert all((found[patch] - found[16]).abs().max() > 1e-4 for patch in range(16))
    assert model.config.mask_ratio == 0.75
    reference = copy.deepcopy(model)
    reference.config.mask_ratio = 0.0
    noise = torch.rand(17, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        shuffled = reference.vit(images, noise=noise).last_hidden_state[:, 1:].mean(1)
    torch.testing.assert_close(found, shuffled, rtol=1e-4, atol=1e-5)


def test_masked_patches_have_a_place() -> None:
    model = made("mae", "DyT")
    for places in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert torch.pdist(places[0, 1:]).min() > 0.1


# --- DiT ---------------------------------------------------------------------------------------------


@DIFFUSERS
def test_frechet_distance() -> None:
    from examples.beyond_llm import dit

    one = np.random.default_rng(0).normal(size=(300, 5)) @ np.diag([1.0, 2.0, 3.0, 0.5, 0.1])
    # Of x and 3 x + b: the roots of the covariances differ by twice that of x.
    shift = np.arange(5.0)
    expected = ((one.mean(0) - (3 * one + shift).mean(0)) ** 2).sum() + 4 * np.trace(np.cov(one.T))
    assert dit.frechet(one, 3 * one + shift) == pytest.approx(expected)
    assert dit.frechet(one, one) == pytest.approx(0, abs=1e-6)
    assert math.isnan(dit.frechet(one * math.inf, one))


@DIFFUSERS
def test_features_are_what_the_classifier_decides_by() -> None:
    from examples.beyond_llm import dit

    images = frame.load("dit").data().test.inputs
    scores = dit.features(images) @ dit.classifier().coefs_[1] + dit.classifier().intercepts_[1]
    assert (scores.argmax(1) == dit.classifier().predict(images.flatten(1))).all()


@DIFFUSERS
def test_samples_of_a_model_that_knows_the_images() -> None:
    """With the exact noise of each step, what is sampled is the image of the label."""
    from types import SimpleNamespace

    from examples.beyond_llm import dit

    known = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    # DiT's 1,000 steps of noise.
    kept = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)

    def noise(images: torch.Tensor, times: torch.Tensor, class_labels: torch.Tensor) -> SimpleNamespace:
        share = kept[times].reshape(-1, 1, 1, 1)
        return SimpleNamespace(sample=(images - share.sqrt() * known[class_labels]) / (1 - share).sqrt())

    labels = torch.tensor([3, 1, 4, 1, 5])
    torch.testing.assert_close(dit.sample(noise, labels), known[labels], rtol=1e-3, atol=1e-3)


@DIFFUSERS
def test_what_starts_at_zero() -> None:
    base, dyt = made("dit", "LayerNorm"), made("dit", "DyT")
    batch = frame.load("dit").data().valid
    times = torch.arange(len(batch.inputs))
    outputs = [m(batch.inputs, times, class_labels=batch.targets).sample.detach() for m in (base, dyt)]
    assert (outputs[0] == 0).all()
    assert outputs[1].std() > 0.1
    zero = {
        name for name, value in base.state_dict().items() if name.endswith("weight") and (value == 0).all()
    }
    modulations = {f"transformer_blocks.{i}.norm1.linear.weight" for i in range(4)}
    assert zero == modulations | {"proj_out_1.weight", "proj_out_2.weight"}
    weights = dyt.state_dict()
    rest = {
        key
        for key in base.state_dict()
        if key.removesuffix("bias").removesuffix("weight") + "weight" not in zero
    }
    assert all(torch.equal(base.state_dict()[key], weights[key]) for key in rest)
    trained = {name for name, parameter in dyt.named_parameters() if parameter.requires_grad}
    assert {f"{site}.alpha" for site in SITES["dit"]} <= trained
    assert not {f"{site}.weight" for site in SITES["dit"]} & trained
