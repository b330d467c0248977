"""DyT in Megatron's own training loop: start-up report, statistics, checkpoints, weights at the start."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dyt.config import MODEL_ARGS
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import running_scale
from megatron_dyt.mcore.norm import DyTNorm

Run = Callable[..., SimpleNamespace]
DYT = ["--normalization", "DyT", "--dyt-preset", "unit"]
AUTO = ["--normalization", "DyT", "--dyt-preset", "auto", "--dyt-running-scale", "none"]
RUNNING = ["--normalization", "DyT", "--dyt-preset", "auto"]


def test_dyt_learns_and_reports_itself(megatron_run: Run, tiny_llama: list[str], tmp_path: Path) -> None:
    argv = [*tiny_llama, *DYT, "--train-iters", "8", "--dyt-stats-interval", "4"]
    argv += ["--save", str(tmp_path), "--save-interval", "8"]
    run = megatron_run(argv)
    assert run.losses[-1] < run.losses[0] - 0.05
    for line in (
        "DyT attn    2 sites",
        "DyT ffn     2 sites",
        "DyT final   1 sites",
        "DyT embedding scale 50",
    ):
        assert line in run.log
    records = [json.loads(line) for line in (tmp_path / "dyt_stats.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 4, 8]
    assert all(len(record["sites"]) == 5 for record in records)
    assert records[0]["sites"][0]["alpha"] == 0.5
    assert records[2]["sites"][0]["alpha"] != 0.5


def test_paper_preset_at_a_small_width_is_warned_about(megatron_run: Run, tiny_llama: list[str]) -> None:
    flags = ["--normalization", "DyT", "--dyt-preset", "paper", "--train-iters", "1"]
    run = megatron_run([*tiny_llama, *flags])
    assert "WARNING: DyT: linear layers start with gain std*sqrt(hidden) = 0.11" in run.log
    assert "Use --dyt-preset auto" in run.log


def test_a_start_of_ones_own_is_warned_about_under_auto(megatron_run: Run, tiny_llama: list[str]) -> None:
    run = megatron_run([*tiny_llama, *AUTO, "--init-method-std", "0.02", "--train-iters", "1"])
    assert "WARNING: DyT: linear layers start with gain std*sqrt(hidden) = 0.11" in run.log
    assert "leave out --dyt-alpha-init-*, --dyt-embedding-scale and --init-method-std" in run.log
    assert "Use --dyt-preset auto" not in run.log


@pytest.mark.parametrize(
    ("saved", "averaged"),
    [([*DYT, "--dyt-bias"], 0), (AUTO, 0), (RUNNING, 2)],
    ids=["alpha", "log alpha", "running scale"],
)
def test_resuming_equals_never_stopping(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, saved: list[str], averaged: int
) -> None:
    flags = [*tiny_llama, *saved, "--train-iters", "8"]
    whole = megatron_run([*flags, "--save", str(tmp_path), "--save-interval", "4"])
    averages = running_averages(whole)
    assert len(averages) == averaged
    assert 1 not in averages
    resumed = megatron_run([*flags, "--load", str(tmp_path), "--ckpt-step", "4"])
    assert resumed.losses == whole.losses[4:]
    assert running_averages(resumed) == averages


def running_averages(run: SimpleNamespace) -> list[float]:
    sites = [module for module in run.model[0].modules() if isinstance(module, DyTNorm)]
    return [float(site.input_rms) for site in sites if site.input_rms is not None]


@pytest.mark.parametrize(
    ("flag", "optimizer"),
    [
        ("--dyt-alpha-in-grad-norm", []),
        ("--no-dyt-alpha-in-grad-norm", []),
        ("--no-dyt-alpha-in-grad-norm", ["--use-distributed-optimizer"]),
    ],
    ids=["counted", "not counted", "not counted, distributed"],
)
def test_the_gradient_norm_counts_the_alphas_or_not(
    megatron_run: Run, tiny_llama: list[str], flag: str, optimizer: list[str]
) -> None:
    run = megatron_run([*tiny_llama, *DYT, flag, *optimizer, "--train-iters", "1", "--clip-grad", "0"])
    counted = [
        parameter.main_grad.square().sum()
        for name, parameter in run.model[0].named_parameters()
        if flag == "--dyt-alpha-in-grad-norm" or not name.endswith(".alpha")
    ]
    assert float(run.optimizer.get_grad_norm()) == pytest.approx(float(sum(counted)) ** 0.5, rel=1e-5)


def test_a_step_that_is_run_twice_moves_a_running_scale_once(
    megatron_run: Run, tiny_llama: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron compares the two passes' losses, which is of use only if nothing has changed in between."""
    from megatron.core.rerun_state_machine import RerunMode

    flags = [*tiny_llama, *RUNNING, "--train-iters", "4"]
    once = megatron_run([*flags, "--rerun-mode", "disabled"])
    # 0.19.2 takes no value of --rerun-mode for it.
    always = RerunMode.REPORT_DETERMINISM_STATS
    monkeypatch.setattr("megatron.training.initialize.RerunMode", lambda _: always)
    # What 0.18 and before report of it fails: their own record has no file name.
    report = "megatron.core.rerun_state_machine.RerunStateMachine._maybe_report_stats"
    monkeypatch.setattr(report, lambda self: None)
    put_back = running_scale.put_back
    again: list[None] = []
    monkeypatch.setattr(running_scale, "put_back", lambda: again.append(put_back()))
    twice = megatron_run(flags)
    assert len(again) == 4
    assert twice.losses == once.losses
    assert running_averages(twice) == running_averages(once)


OTHER_NORM = "holds a LayerNorm or RMSNorm model and this one is DyT"
RUNNING_SCALE = r"The DyT settings differ .*running scale"
LOG_ALPHA = r"The DyT settings differ .*log alpha"


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        pytest.param([], DYT, OTHER_NORM, id="norm"),
        pytest.param(RUNNING, AUTO, RUNNING_SCALE, id="running scale goes"),
        pytest.param(AUTO, RUNNING, RUNNING_SCALE, id="running scale comes"),
        pytest.param(DYT, AUTO, LOG_ALPHA, id="alpha as its logarithm"),
        pytest.param(AUTO, DYT, LOG_ALPHA, id="logarithm as alpha"),
    ],
)
def test_a_checkpoint_of_another_kind_is_refused(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, saved: list[str], given: list[str], message: str
) -> None:
    saving = ["--train-iters", "1", "--save", str(tmp_path), "--save-interval", "1"]
    megatron_run([*tiny_llama, *saved, *saving])
    with pytest.raises(UserError, match=message):
        megatron_run([*tiny_llama, *given, "--load", str(tmp_path)])


# Every setting that a checkpoint brings along, at a value that no preset has.
SETTINGS = {
    "dyt_preset": "unit",
    "dyt_alpha_init_attn": 0.71,
    "dyt_alpha_init_ffn": 0.31,
    "dyt_alpha_init_final": 0.41,
    "dyt_alpha_init_qk": 0.61,
    "dyt_bias": True,
    "dyt_embedding_scale": 2.5,
    "dyt_function": "erf",
    "dyt_weight_init": "one",
    "dyt_log_alpha": True,
    "dyt_running_scale": "all",
    "dyt_freeze_alpha": True,
    "embedding_scale": 2.5,
}


def test_a_checkpoint_brings_every_dyt_setting(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path
) -> None:
    from megatron.training import get_args

    assert set(SETTINGS) == set(MODEL_ARGS)
    base = [*tiny_llama, "--qk-layernorm"]
    saving = ["--train-iters", "1", "--save", str(tmp_path), "--save-interval", "1"]
    flags = [
        word
        for name, value in SETTINGS.items()
        for word in [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    ]
    saved = megatron_run([*base, "--normalization", "DyT", *flags, *saving])
    shapes = {name: p.shape for name, p in saved.model[0].named_parameters()}
    loading = ["--use-checkpoint-args", "--load", str(tmp_path), "--finetune", "--train-iters", "1"]
    loaded = megatron_run([*base, *loading])
    restored = vars(get_args())
    assert {name: restored[name] for name in SETTINGS} == SETTINGS
    assert {name: p.shape for name, p in loaded.model[0].named_parameters()} == shapes
    sites = [module for module in loaded.model[0].modules() if isinstance(module, DyTNorm)]
    assert len(sites) == 9
    assert {site.function for site in sites} == {"erf"}
    assert {site.alpha_init for site in sites} == {0.71, 0.31, 0.41, 0.61}


def test_both_norms_start_from_the_same_weights(megatron_run: Run, tiny_llama: list[str]) -> None:
    std = ["--init-method-std", "0.1768", "--embedding-init-method-std", "0.02"]
    start = ["--train-iters", "1", "--lr", "0", "--min-lr", "0"]
    rms = megatron_run([*tiny_llama, *start, *std, "--embedding-scale", "unit"]).weights()
    dyt = megatron_run([*tiny_llama, *start, *std, *DYT]).weights()
    shared = [name for name in dyt if "norm" not in name]
    assert len(shared) == 2 * 4 + 3
    for name in shared:
        assert torch.equal(dyt[name], rms[name]), name


def test_bf16_trains(megatron_run: Run, tiny_llama: list[str]) -> None:
    run = megatron_run([*tiny_llama, *DYT, "--bf16", "--train-iters", "6"])
    assert run.losses[-1] < run.losses[0]
    dtypes = {p.dtype for p in run.model[0].parameters()}
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dyt-alpha-init-attn", "-1"], "--dyt-alpha-init-attn is -1.0"),
        (["--apply-layernorm-1p"], "apply-layernorm-1p"),
        (["--qk-l2-norm"], "qk_l2_norm"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    megatron_run: Run, tiny_llama: list[str], flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        megatron_run([*tiny_llama, *DYT, *flags])
