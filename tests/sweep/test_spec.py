"""A sweep file becomes runs; what cannot be is refused with the place and what is allowed."""

from pathlib import Path

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.sweep import spec
from megatron_dyt.sweep.spec import Seed, Sweep

FILE = """
title: A title
prepare: echo hello
base:
  - --hidden-size 64 --num-layers 2
  - --init-method-std {1/sqrt(hidden_size)}
grid:
  norm:
    rmsnorm: --normalization RMSNorm
    dyt: [--normalization DyT, --dyt-preset unit]
  lr:
    flags: --lr {lr} --min-lr {lr/10}
    values: [8e-3, 1e-2]
seeds: [1, {weights: 1, data: 2}]
compare: {axis: norm, baseline: rmsnorm, best_over: lr}
"""


def load(tmp_path: Path, text: str, *extra: str) -> Sweep:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return spec.load(path, extra)


def test_the_runs_are_the_grid_with_one_seed_after_the_other(tmp_path: Path) -> None:
    sweep = load(tmp_path, FILE)
    assert [run.name for run in sweep.runs] == [
        f"norm={norm},lr={lr},seed={seed}"
        for seed in ("1", "1+2")
        for norm in ("rmsnorm", "dyt")
        for lr in ("8e-3", "1e-2")
    ]
    assert sweep.axes == ("norm", "lr")


def test_flags_of_a_run(tmp_path: Path) -> None:
    run = load(tmp_path, FILE, "--num-layers", "4").runs[-1]
    assert " ".join(run.flags) == (
        "--hidden-size 64 --num-layers 2 --init-method-std 0.125 --normalization DyT --dyt-preset unit "
        "--lr 1e-2 --min-lr 0.001 --num-layers 4 --seed 1 --data-seed 2"
    )


@pytest.mark.parametrize(
    ("seed", "flags"),
    [(Seed(3, 3), ["--seed", "3"]), (Seed(3, 4), ["--seed", "3", "--data-seed", "4"])],
)
def test_a_seed_of_both_is_megatrons_own_flag(seed: Seed, flags: list[str]) -> None:
    assert seed.flags == flags


def test_several_grids_make_one_sweep(tmp_path: Path) -> None:
    sweep = load(
        tmp_path,
        """
grid:
  - norm: {rmsnorm: --normalization RMSNorm}
  - norm: {dyt: --normalization DyT, rmsnorm: --normalization RMSNorm}
    alpha:
      flags: --dyt-alpha-init-attn {alpha}
      values: [0.5]
  - norm: {rmsnorm: --normalization RMSNorm}
seeds: 7
""",
    )
    assert [run.name for run in sweep.runs] == [
        "norm=rmsnorm,seed=7",
        "norm=dyt,alpha=0.5,seed=7",
        "norm=rmsnorm,alpha=0.5,seed=7",
    ]
    assert sweep.axes == ("norm", "alpha")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("title:", "titel:"), "unknown key titel; allowed: title, like"),
        (("values: [8e-3, 1e-2]", "values: []"), "grid: lr is empty"),
        (("values: [8e-3, 1e-2]", "values: [8e-3, 8e-3]"), "lr has a value twice"),
        (("values: [8e-3, 1e-2]", "values: [a b]"), "'a b'"),
        (("values: [8e-3, 1e-2]", "value: [8e-3]"), "unknown key value; allowed: flags, values"),
        (("--lr {lr} --min-lr {lr/10}", "--lr 1e-3"), r"flags must use \{lr\}"),
        (("{lr/10}", "{rate/10}"), "rate is neither"),
        (("seeds: [1,", "seeds: [0,"), "a seed is a whole number above 0"),
        (("seeds: [1, {weights: 1, data: 2}]", "seeds: []"), "seeds is empty"),
        (("data: 2", "order: 2"), "unknown key order"),
        (("  lr:", "  seed:"), "not seed"),
        (("--num-layers 2", "--seed 5"), "--seed cannot be given"),
        (("--num-layers 2", "--save out"), "--save cannot be given"),
        (("axis: norm", "axis: width"), "axis is width; the axes are norm, lr"),
        (("baseline: rmsnorm", "baseline: layernorm"), "baseline is layernorm; norm has rmsnorm, dyt"),
        (("best_over: lr", "best_over: norm"), "must differ"),
        (("title: A title", "title: ["), "is no YAML"),
        (("hello\n", "hello\nbase: --x 1\n"), "base stands twice in one place, at line 2"),
        (("  - --hidden-size 64 --num-layers 2\n", "  - {a: b}\n"), "base has .*; give text"),
    ],
)
def test_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = FILE.replace(*change)
    assert text != FILE
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


@pytest.mark.parametrize("best_over", ["", ", best_over: lr"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("{norm: {rms: --a}}", "{norm: {rms: --a, dyt: --b}, final: {rms: --c, dyt: --d}}"),
        ("{norm: {rms: --a, dyt: --b}, lr: {x: --c}}", "{lr: {x: --c}, norm: {rms: --a, dyt: --b}}"),
    ],
)
def test_two_baselines_at_one_place_are_refused(
    tmp_path: Path, first: str, second: str, best_over: str
) -> None:
    grids = f"grid: [{first}, {second}, {{lr: {{y: --e}}}}]"
    with pytest.raises(UserError, match=r"norm=(rms|dyt).* and .* stand at one place"):
        load(tmp_path, f"{grids}\ncompare: {{axis: norm, baseline: rms{best_over}}}")


def test_a_baseline_serves_all_points_that_have_an_axis_more(tmp_path: Path) -> None:
    sweep = load(
        tmp_path,
        "grid: [{norm: {rms: --a}}, {norm: {dyt: --b}, alpha: {x: --c, y: --d}}]\n"
        "compare: {axis: norm, baseline: rms}",
    )
    assert sweep.compare is not None
    assert [[run.name for run in fitting] for _runs, fitting in sweep.compare.pairs(sweep.runs)] == [
        ["norm=rms,seed=1234"]
    ] * 2


def test_a_file_like_another_adds_to_its_base(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(FILE)
    text = "like: other.yaml\nbase: --num-layers 8\ngrid:\n  lr:\n    flags: --lr {lr}\n    values: 1e-3"
    sweep = load(tmp_path, text)
    assert sweep.prepare == ("echo hello",)
    assert [" ".join(run.flags) for run in sweep.runs] == [
        "--hidden-size 64 --num-layers 2 --init-method-std 0.125 --num-layers 8 --lr 1e-3 --seed 1234"
    ]
    assert sweep.compare is None


def test_a_file_like_one_that_is_like_another_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("like: third.yaml")
    with pytest.raises(UserError, match=r"study.yaml: like names .*third.yaml"):
        load(tmp_path, "like: other.yaml")


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        ("{x: lr, series: norm, y: lr}", "give x, with either"),
        ("{x: lr, series: lr}", "give x, with either"),
        ("{series: lr}", "give x"),
        ("{x: width}", "x is width; the axes are norm, lr"),
        ("{x: lr, z: norm}", "unknown key z"),
    ],
)
def test_a_figure_that_cannot_be_is_refused(tmp_path: Path, plot: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, f"{FILE}\nplots: [{plot}]")


@pytest.mark.parametrize("text", ["", "grid:", "grid: {}", "grid: []", "base: --lr 1e-3"])
def test_a_file_without_a_grid_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"is empty|is ''"):
        load(tmp_path, text)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        spec.load(tmp_path / "none.yaml")
