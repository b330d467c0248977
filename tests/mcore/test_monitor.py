import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dyt.config import DyTConfig
from megatron_dyt.mcore import monitor
from megatron_dyt.mcore.json_lines import JsonLines
from megatron_dyt.mcore.monitor import Monitor

Make = Callable[..., Any]
LossOf = Callable[[Any], torch.Tensor]

StartLines = Callable[[Monitor], list[str]]


@pytest.fixture
def make_monitor(make_config: Make, build_gpt: Make) -> Callable[..., tuple[Monitor, Any]]:
    def make(dyt: DyTConfig | None = None, gain: float = 1.0, **options: Any) -> tuple[Monitor, Any]:
        config = make_config()
        config.dyt = dyt or DyTConfig.unit(32)
        model = build_gpt(config)
        return Monitor([model], linear_gain=gain, **options), model

    return make


def test_start_up_logs_one_line_per_role_with_what_was_measured(
    make_monitor: Make, loss_of: LossOf, capsys: pytest.CaptureFixture[str]
) -> None:
    watch, model = make_monitor()
    watch.look()
    loss_of(model)
    inputs = model.embedding(torch.arange(32).reshape(2, 16) * 7 % 64, torch.arange(16).expand(2, 16))
    drive = 0.5 * inputs.std(correction=0).item()
    watch.after_step(1)
    lines = [line.removeprefix("megatron_dyt: ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("DyT attn    2 sites, alpha0 0.5, alpha*std(x) of the first batch ")
    numbers = [float(word) for word in lines[0].split("batch ")[1].split(" to ")]
    assert drive == pytest.approx(numbers[0], rel=0.01) or drive == pytest.approx(numbers[1], rel=0.01)
    assert lines[1].startswith("DyT ffn     2 sites, alpha0 0.25")
    assert lines[2].startswith("DyT final   1 sites, alpha0 0.25")
    assert lines[3] == "DyT embedding scale 50"
    assert not [line for line in lines if "WARNING" in line]
    # Once.
    watch.look()
    loss_of(model)
    watch.after_step(2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("role", "alpha", "warns"),
    [
        ("ffn", 0.001, True),
        ("ffn", 0.5, False),
        ("ffn", 2.0, True),
        ("attn", 2.0, False),
        ("attn", 30.0, True),
    ],
)
def test_a_site_far_from_the_range_that_trains_is_warned_about(
    make_monitor: Make, loss_of: LossOf, role: str, alpha: float, warns: bool, start_lines: StartLines
) -> None:
    watch, model = make_monitor(DyTConfig.unit(32, **{f"alpha_{role}": alpha}))
    watch.look()
    loss_of(model)
    warnings = [line for line in start_lines(watch) if line.startswith(f"WARNING: DyT {role}")]
    assert bool(warnings) is warns
    if warns:
        assert f"--dyt-alpha-init-{role}" in warnings[0]


@pytest.mark.parametrize("settings", [{}, {"running_scale": "all"}])
@pytest.mark.parametrize(("function", "warned"), [("tanh", set()), ("identity", {"attn", "ffn", "final"})])
def test_sites_that_nothing_bounds_are_warned_about(
    make_monitor: Make,
    loss_of: LossOf,
    function: str,
    warned: set[str],
    settings: dict[str, Any],
    start_lines: StartLines,
) -> None:
    watch, model = make_monitor(DyTConfig.unit(32, function=function, **settings))
    watch.look()
    loss_of(model)
    lines = [line for line in start_lines(watch) if "bounds nothing" in line]
    assert {line.split()[2].rstrip(":") for line in lines} == warned


def test_an_alpha_that_was_trained_is_called_so_and_not_warned_about(
    make_monitor: Make, loss_of: LossOf, start_lines: StartLines
) -> None:
    watch, model = make_monitor()
    with torch.no_grad():  # As from a checkpoint.
        model.decoder.layers[0].pre_mlp_layernorm.alpha.fill_(9.0)
        model.decoder.final_layernorm.alpha.fill_(9.0)
    watch.look()
    loss_of(model)
    lines = start_lines(watch)
    assert "alpha 0.25 to 9 (trained)" in lines[1]
    (final,) = [line for line in lines if "final" in line]
    assert "alpha 9 to 9 (trained)" in final
    assert not [line for line in lines if "WARNING" in line]


@pytest.mark.parametrize("alpha", [0.001, 0.005, 0.3])
def test_a_start_rounded_to_bfloat16_is_a_start(alpha: float) -> None:
    rounded = torch.tensor(math.log(alpha)).bfloat16().exp().item()
    assert math.isclose(rounded, alpha, rel_tol=monitor._rounding(alpha))


@pytest.mark.parametrize(("gain", "warns"), [(0.16, True), (1.28, False), (9.0, True)])
def test_fading_linear_layers_are_warned_about(
    make_monitor: Make, gain: float, warns: bool, start_lines: StartLines
) -> None:
    watch, _ = make_monitor(gain=gain)
    assert any("std*sqrt(hidden)" in line for line in start_lines(watch)) is warns


@pytest.mark.parametrize("preset", ["unit", "auto"])
def test_a_warning_does_not_advise_the_preset_in_use(
    make_monitor: Make, loss_of: LossOf, preset: str, start_lines: StartLines
) -> None:
    watch, model = make_monitor(DyTConfig.unit(32, alpha_ffn=9.0), gain=0.1, preset=preset)
    watch.look()
    loss_of(model)
    warnings = [line for line in start_lines(watch) if line.startswith("WARNING")]
    assert len(warnings) == 3  # Two sites in front of MLPs, and the linear layers.
    assert all(("Use --dyt-preset auto" in line) is (preset == "unit") for line in warnings)


def test_statistics_are_those_of_the_step_before_its_update(
    make_monitor: Make, loss_of: LossOf, tmp_path: Path
) -> None:
    file = tmp_path / "save" / "dyt_stats.jsonl"
    watch, model = make_monitor(stats_file=JsonLines(file), interval=3)
    watch.look()
    for step in range(1, 8):
        loss_of(model)
        with torch.no_grad():
            model.decoder.final_layernorm.alpha += 1.0
        watch.after_step(step)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 3, 6]
    final = [record["sites"][-1] for record in records]
    assert [site["alpha"] for site in final] == pytest.approx([0.25, 2.25, 5.25])
    assert {site["name"] for site in final} == {"decoder.final_layernorm"}
    for site in final:
        assert site["alpha_std"] == pytest.approx(site["alpha"] * site["input_std"], rel=1e-5)
        assert site["layer"] is None
        assert site["role"] == "final"
    # Of a standard normal, |5.25 x| > 2 has probability 0.703; |0.25 x| > 2 has none to speak of.
    assert final[0]["saturated"] < 0.001
    assert final[2]["saturated"] == pytest.approx(0.703, abs=0.1)
    assert records[0]["embedding_scale"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("function", "threshold"),
    [("tanh", 2.0), ("hardtanh", 1.0), ("sigmoid", 4.0), ("erf", 1.63), ("identity", math.inf)],
)
def test_saturation_begins_where_the_function_does(
    make_monitor: Make, loss_of: LossOf, function: str, threshold: float
) -> None:
    watch, model = make_monitor(DyTConfig.unit(32, function=function, alpha_final=2.5))
    final, inputs = model.decoder.final_layernorm, []
    if function == "erf":
        torch.nn.init.constant_(final.shift, -0.7)
    final.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
    watch.look()
    loss_of(model)
    z = 2.5 * inputs[0].float() - (0.7 if function == "erf" else 0.0)
    share = (z.abs() > threshold).float().mean().item()
    assert float(watch.samples[final].input.saturated) == pytest.approx(share, abs=1e-3)
    assert (share > 0.05) is (function != "identity")


def test_nothing_is_recorded_between_two_looks(make_monitor: Make, loss_of: LossOf, tmp_path: Path) -> None:
    watch, model = make_monitor(stats_file=JsonLines(tmp_path / "s"), interval=10)
    watch.look()
    loss_of(model)
    watch.after_step(1)
    assert all(site.module.probe is None for site in watch.sites)
    loss_of(model)
    assert watch.samples == {}
    watch.after_step(9)
    assert all(site.module.probe is not None for site in watch.sites)


def test_ranks_that_do_not_report_log_and_write_nothing(
    make_monitor: Make, loss_of: LossOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch, model = make_monitor(stats_file=JsonLines(tmp_path / "s"), interval=1, reports=False)
    watch.look()
    loss_of(model)
    watch.after_step(1)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "s").exists()


def test_a_stage_without_embedding_has_no_scale(make_config: Make, build_gpt: Make) -> None:
    model = build_gpt(make_config(), pre_process=False)
    assert monitor.find_embedding_scale([model]) is None


def test_the_training_log_seam_finds_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    class Watch:
        def after_step(self, iteration: int) -> None:
            steps.append(iteration)

    def training_log(loss_dict: Any, total: Any, learning_rate: Any, iteration: Any, rest: Any = 0) -> str:
        return "flag"

    monkeypatch.setattr(monitor, "_active", Watch())
    wrapped = monitor.wrap_training_log(training_log)
    assert wrapped({}, {}, 0.1, 7) == "flag"
    assert wrapped({}, {}, learning_rate=0.1, iteration=8) == "flag"
    monkeypatch.setattr(monitor, "_active", None)
    wrapped({}, {}, 0.1, 9)
    assert steps == [7, 8]


def test_evaluation_is_not_recorded(make_monitor: Make, loss_of: LossOf) -> None:
    watch, model = make_monitor()
    watch.look()
    model.eval()
    loss_of(model)
    assert watch.samples == {}


def test_the_embedding_scale_is_read_where_it_is_whole(
    make_monitor: Make, loss_of: LossOf, start_lines: StartLines
) -> None:
    """Between two steps a rank of Megatron-FSDP may have nothing of it."""
    watch, model = make_monitor()
    module = model.embedding.embedding_scale
    whole, module.scale = module.scale, torch.nn.Parameter(torch.empty(0))
    watch.look()
    module.scale = whole
    loss_of(model)
    assert "DyT embedding scale 50" in start_lines(watch)
    with torch.no_grad():
        whole.fill_(7.0)
    loss_of(model)
    assert "DyT embedding scale 50" in start_lines(watch)  # Of the first pass, as all else.
    watch.after_step(1)
    assert not module._forward_pre_hooks
