"""A trained model of another domain is converted: what is measured is of the models that the table names."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.beyond_llm import convert
from examples.beyond_llm import run as frame
from examples.beyond_llm.domain import Data, Domain, Split
from megatron_dyt import DynamicTanh, convert_norms
from megatron_dyt.errors import UserError
from tests.examples.test_beyond_llm import NAMES

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("small_data")
OWN, PLAIN, FITTED = "LayerNorm, as it was", "DyT, alpha 0.5", "DyT, calibrated"
INPUTS = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
DATA = Data(INPUTS, torch.stack([INPUTS[:, 0] * INPUTS[:, 1], INPUTS[:, 2]], 1))


def loss(model: nn.Module, batch: Data, generator: torch.Generator) -> torch.Tensor:
    return (model(batch.inputs) - batch.targets).square().mean()


PRODUCTS = Domain(
    title="products",
    metrics={"error": ("m", False)},
    model=lambda: nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 2)
    ),
    data=lambda: Split(DATA, DATA, DATA),
    loss=loss,
    evaluate=lambda model, data, split: {"error": 2 * float(loss(model, data, None).detach())},
    rates=(1e-2,),
    steps=60,
    batch=32,
)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "load", lambda name: PRODUCTS)


def run(output: Path, *more: str) -> dict[str, dict[str, dict[str, float]]]:
    convert.main(["vit", "--seeds", "1", "--output", str(output), *more])
    return json.loads((output / "converted/vit-seed1.json").read_text())["ways"]


@pytest.mark.usefixtures("products")
def test_figures_are_those_of_the_models_named(tmp_path: Path) -> None:
    found = run(tmp_path, "--tune-steps", "10", "--tune-rates", "1e-3", "1e-9")
    assert list(found) == [OWN, PLAIN, FITTED]
    split = PRODUCTS.data()
    model = frame.start(frame.Run("vit", "LayerNorm", 1e-2, 1), PRODUCTS)
    frame.fit(model, PRODUCTS, split, 1e-2, 1)
    plain, fitted = copy.deepcopy(model), copy.deepcopy(model)
    convert_norms(plain)
    convert_norms(fitted, split.train.batch(torch.Generator().manual_seed(1), 64).inputs)
    for way, each in ((OWN, model), (PLAIN, plain), (FITTED, fitted)):
        value = float(loss(each, DATA, None).detach())
        assert found[way]["0"] == pytest.approx({"loss": value, "error": 2 * value}, rel=1e-5)
    tuned = copy.deepcopy(plain)
    frame.fit(tuned, replace(PRODUCTS, steps=10), split, 1e-3, 1 + convert.FURTHER)
    assert found[PLAIN]["10"]["loss"] == pytest.approx(float(loss(tuned, DATA, None).detach()), rel=1e-5)
    # The calibration is worth it, and the better of two rates is taken.
    assert found[FITTED]["0"]["loss"] < 0.5 * found[PLAIN]["0"]["loss"]
    assert found[PLAIN]["10"]["loss"] < 0.99 * found[PLAIN]["0"]["loss"]


@pytest.mark.usefixtures("products")
def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["--tune-steps", "4", "2", "--tune-rates", "1e-3"]
    found = run(tmp_path, *sizes)
    monkeypatch.setattr(convert, "compare", lambda *_: pytest.fail("trained again"))
    assert run(tmp_path, *sizes) == found
    table = [line.split("|") for line in (tmp_path / "converted.md").read_text().splitlines()]
    assert [cell.strip() for cell in table[0][3:-1]] == ["right after", "2 steps", "4 steps"]
    shown = {row[2].strip(): row[3:-1] for row in table[2::2]}
    for way, points in found.items():
        for point, cell in zip(("0", "2", "4"), shown[way], strict=True):
            assert float(cell) == pytest.approx(points[point]["loss"], abs=6e-4)
    with pytest.raises(UserError, match=r"'steps': 60.*'steps': 5.*choose another --output"):
        run(tmp_path, "--steps", "5", *sizes)


def test_a_model_that_diverges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = replace(PRODUCTS, loss=lambda *arguments: loss(*arguments) * torch.nan)
    monkeypatch.setattr(frame, "load", lambda name: broken)
    with pytest.raises(
        UserError, match=r"vit diverges with LayerNorm at a rate of 0.01; give a lower --rates"
    ):
        run(tmp_path)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--tune-steps", "0", "--tune-steps 0: 1 is the least"),
        ("--tune-rates", "inf", "--tune-rates inf: it has to be finite and above 0"),
        ("--seeds", "0", "--seeds 0: 1 is the least"),
    ],
)
def test_impossible_values(
    flag: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, flag, value)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_every_domain_can_be_calibrated(name: str) -> None:
    domain = frame.load(name)
    split = domain.data()
    model = frame.start(frame.Run(name, domain.norm, domain.rates[0], 1), domain).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = Data(split.train.inputs[:64], split.train.targets[:64])
    convert.convert(model, FITTED, domain, replace(split, train=batch), seed=1)
    dyts = {site: module for site, module in model.named_modules() if isinstance(module, DynamicTanh)}
    assert dyts
    assert any(float(module.alpha.detach()) != 0.5 for module in dyts.values())
    after = model.state_dict()
    others = [key for key in before if key.rpartition(".")[0] not in dyts]
    assert all(torch.equal(before[key], after[key]) for key in others)
