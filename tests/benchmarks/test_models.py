"""The benchmarks of whole models, at tiny shapes: every variant is the model that its name says.

On a GPU these are what `pytest -m gpu` has of Megatron's layers, in bf16.
"""

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.needs("training_loop")


DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Of losses and gradients that are rounded at other places.
TOLERANCES = {"cpu": 1e-6, "cuda": 2e-2}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


@pytest.fixture
def model(device: str) -> Iterator[ModuleType]:
    """benchmarks/model.py in a world of one process on the device."""
    world = importlib.import_module("megatron_world")
    with world.one_process_world(device):
        yield importlib.import_module("model")


@pytest.fixture
def shape(model: ModuleType) -> Any:
    return model.Shape(layers=2, hidden=32, ffn=64, heads=4, vocabulary=64, tokens=16, sequences=2)


def loss_tensor(model: Any, shape: Any) -> torch.Tensor:
    positions = torch.arange(shape.tokens, device=next(model.parameters()).device).expand(shape.sequences, -1)
    tokens = positions * 7 % shape.vocabulary
    loss: torch.Tensor = model(tokens, positions, None, labels=tokens.roll(-1, 1)).float().mean()
    return loss


def loss_of(model: Any, shape: Any) -> float:
    return loss_tensor(model, shape).item()


def gradients_of(model: Any, shape: Any) -> torch.Tensor:
    """All of the model's gradients, in one vector."""
    loss_tensor(model, shape).backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters()])


def test_variants_compute_what_they_are_called(model: ModuleType, shape: Any, device: str) -> None:
    losses = {
        v.name: loss_of(model.build(shape, v, device, DTYPES[device]), shape)
        for v in model.VARIANTS
        if not v.te and v.plain != "compiled"
    }
    assert losses["dyt fused"] == losses["dyt"]
    assert losses["dyt eager"] == pytest.approx(losses["dyt"], rel=TOLERANCES[device])
    assert len({round(losses[name], 5) for name in ("rmsnorm torch", "dyt", "derf fused")}) == 3


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_gradients_do_not_depend_on_fusion_or_recomputation(
    model: ModuleType, shape: Any, device: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = (v for v in model.VARIANTS if v.name in ("dyt", "dyt fused"))
    expected = gradients_of(model.build(shape, plain, device, DTYPES[device]), shape)
    make_config = model.make_config

    def changed(*args: Any) -> Any:
        config = make_config(*args)
        if recomputed:
            config.recompute_granularity, config.recompute_modules = "selective", ["layernorm"]
        return config

    monkeypatch.setattr(model, "make_config", changed)
    found = gradients_of(model.build(shape, fused, device, DTYPES[device]), shape)
    assert (found - expected).norm() <= TOLERANCES[device] * expected.norm()


def test_training_steps_lower_the_loss(model: ModuleType, shape: Any, device: str) -> None:
    (variant,) = (v for v in model.VARIANTS if v.name == "dyt fused")
    trained = model.build(shape, variant, device, DTYPES[device])
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = loss_tensor(trained, shape)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_fused_variants_fuse(
    model: ModuleType, shape: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_dyt.mcore.norm import DyTNorm

    calls: list[str] = []
    original = DyTNorm.forward_residual
    monkeypatch.setattr(DyTNorm, "forward_residual", lambda self, *a: calls.append("") or original(self, *a))
    for variant in model.VARIANTS:
        if variant.te or variant.plain == "compiled" or variant.dyt is None:
            continue
        calls.clear()
        loss_of(model.build(shape, variant, device, DTYPES[device]), shape)
        assert bool(calls) == ("fused" in variant.name), variant.name


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_attention_is_megatrons(model: ModuleType, shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = model.VARIANTS[0]
    ours = loss_of(model.build(shape, variant, "cpu", torch.float32), shape)
    from megatron.core.models.gpt import gpt_layer_specs

    monkeypatch.setattr(model, "make_spec", lambda config, te: gpt_layer_specs.get_gpt_layer_local_spec())
    theirs = model.build(shape, variant, "cpu", torch.float32)
    mask = torch.triu(torch.ones(shape.tokens, shape.tokens, dtype=torch.bool), diagonal=1)[None, None]
    monkeypatch.setattr(theirs, "forward", lambda t, p, _, f=theirs.forward, **kw: f(t, p, mask, **kw))
    assert loss_of(theirs, shape) == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_a_row_for_each_variant_that_runs(model: ModuleType, shape: Any) -> None:
    left_out: dict[str, str] = {}
    steps = model.working_variants(shape, "cpu", torch.float32, False, left_out)
    assert steps.keys() | left_out.keys() == {v.name for v in model.VARIANTS}
    assert left_out.keys() == {"rmsnorm te", "dyt te", "dyt compiled"}
    rows = model.measure(steps, 2, 32, "cpu")
    assert [row["variant"] for row in rows] == list(steps)
    assert rows[0]["tokens_per_s"] == pytest.approx(32 / rows[0]["median_us"] * 1e6)
    report = {"results": rows, "settings": shape._asdict() | {"dtype": "float32"}}
    best = min(
        rows[0]["median_us"], *(row["median_us"] for row in rows if row["variant"] == "rmsnorm te"), 1e9
    )
    assert model.table(report).splitlines()[3].endswith(f"{rows[1]['median_us'] / best:.3f} |")


def test_hf_variants_share_all_but_the_norms() -> None:
    hf = importlib.import_module("hf_model")
    base = hf.make_model(
        hf.SMALL | {"hidden_size": 32, "num_attention_heads": 4}, 2, 16, "cpu", torch.float32
    )
    tokens = torch.arange(16)[None]
    outputs = {}
    for name, make in hf.VARIANTS.items():
        twin, norms = hf.with_norms(base, make)
        assert len(norms) == 5
        assert norms[-1] is twin.model.norm
        assert twin.lm_head.weight is base.lm_head.weight
        assert twin.model.layers[1].mlp.up_proj.weight is base.model.layers[1].mlp.up_proj.weight
        outputs[name] = twin(input_ids=tokens).logits
    torch.testing.assert_close(outputs["rmsnorm"], base(input_ids=tokens).logits, rtol=0, atol=0)
    torch.testing.assert_close(outputs["dyt plain"], outputs["dyt"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(outputs["identity"], outputs["dyt"], atol=1e-3)


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}


def hf_report(hf: ModuleType, output: Path | None, **options: bool) -> dict[str, Any]:
    """What it measures of one tiny layer."""
    given = {"compile": False, "only_compiled": False} | options
    args = SimpleNamespace(layers=1, tokens=8, rounds=2, output=output, **given)
    report: dict[str, Any] = hf.new_report("hf_model", "cpu", TINY | {"layers": 1, "tokens": 8})
    hf.measure_all(args, TINY, "cpu", report)
    return report


def test_hf_report_has_every_variant_in_both_modes() -> None:
    hf = importlib.import_module("hf_model")
    report = hf_report(hf, None)
    assert [(r["mode"], r["variant"]) for r in report["results"]] == [
        (mode, variant) for mode in hf.MODES for variant in hf.VARIANTS
    ]
    row = report["results"][0]
    seconds = 100 * row["model"]["median_us"] / 1e6
    assert f"| {seconds:.2f} |" in hf.table(report).splitlines()[2]
    assert report["left_out"].keys() == {"compiled"}
    values = re.findall(r">(\d+\.\d\d)</text>", hf.picture(report))
    assert len(values) >= 8  # One behind each bar, and perhaps the axis.


def test_hf_report_has_what_was_measured_before_it_was_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hf = importlib.import_module("hf_model")
    model_pass = hf.model_pass

    def no_training(model: Any, tokens: torch.Tensor, mode: str) -> Any:
        if mode == "training":
            raise KeyboardInterrupt
        return model_pass(model, tokens, mode)

    monkeypatch.setattr(hf, "model_pass", no_training)
    with pytest.raises(KeyboardInterrupt):
        hf_report(hf, tmp_path)
    (saved,) = tmp_path.glob("*.json")
    rows = json.loads(saved.read_text())["results"]
    assert [(row["mode"], row["variant"]) for row in rows] == [("inference", name) for name in hf.VARIANTS]


@pytest.mark.parametrize("first", ["paper", "paper-compiled"])
def test_hf_reports_of_two_stages_leave_nothing_out(
    first: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hf, run = (importlib.import_module(name) for name in ("hf_model", "run"))
    monkeypatch.setattr(torch, "compile", lambda module: module)
    reports = {
        "paper": hf_report(hf, None),
        "paper-compiled": hf_report(hf, None, compile=True, only_compiled=True),
    }
    assert [bool(report["left_out"]) for report in reports.values()] == [True, False]
    for age, name in enumerate(sorted(reports, key=lambda name: name != first)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"reports": [reports[name]]}))
        os.utime(path, (age, age))
    run.take(tmp_path, tmp_path / "results")
    (saved,) = (tmp_path / "results").glob("*.json")
    found = json.loads(saved.read_text())
    assert {row["compiled"] for row in found["results"]} == {False, True}
    assert found["left_out"] == {}


def test_hf_says_why_it_did_not_compile() -> None:
    hf = importlib.import_module("hf_model")
    assert hf.why_eager("cpu") == hf_report(hf, None)["left_out"]["compiled"]
    assert hf.why_eager("cuda") == "--no-compile was given"


def test_hf_norms_are_trained_alone() -> None:
    hf = importlib.import_module("hf_model")
    norm = hf.PlainDyT(8)
    x = torch.randn(1, 4, 8)
    hf.layers_pass([norm, norm], x, "training")()
    leaf = x.clone().requires_grad_()
    (2 * norm(leaf)).backward(x)
    # Twice in the pass, and once more with factor 2 here: the same sum again.
    once = norm.weight.grad.clone()
    norm.weight.grad = None
    (2 * norm(leaf)).backward(x)
    torch.testing.assert_close(once, 2 * norm.weight.grad)
    norm.weight.grad = None
    hf.layers_pass([norm], x, "inference")()
    assert norm.weight.grad is None
