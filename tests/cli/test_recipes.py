"""The commands `recipe`, `plan` and `dry-run`."""

import json
import shlex
from typing import Any

import pytest
from click.testing import CliRunner

from megatron_dyt.cli import main
from megatron_dyt.recipes import dry_run, load, names

SEVENTY = "plan --model 70b --nodes 128 --gpus-per-node 8 --gpu-memory 80"


def output(command: str) -> str:
    result = CliRunner().invoke(main, shlex.split(command), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def planned(command: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output(f"{command} --format json"))
    return found


def test_all_recipes_are_listed() -> None:
    assert [line.split()[1] for line in output("recipe").splitlines()] == [f"{name}:" for name in names()]


def test_a_recipes_text_has_notes_and_flags() -> None:
    text = output("recipe 34b")
    assert "note: rope_base" in text
    assert "--num-layers 48" in text


@pytest.mark.parametrize("norm", ["DyT", "RMSNorm"])
def test_flags_are_the_recipes(norm: str) -> None:
    assert shlex.split(output(f"recipe 7b --norm {norm} --format flags")) == load("7b").flags(norm)


def test_a_plans_text_has_the_layout_with_reasons_memory_bubble_and_days() -> None:
    text = output(SEVENTY)
    for part in ("layout: TP ", "why: ", "optimizer (fp32, over DP", "bubble ", "4.19M tokens"):
        assert part in text
    assert " days at 40% MFU" in text


def test_a_plans_json_and_flags_agree() -> None:
    data = planned(SEVENTY)
    assert shlex.split(output(f"{SEVENTY} --format flags")) == data["flags"]
    sizes = data["layout"]
    assert sizes["tp"] * sizes["pp"] * sizes["dp"] == 1024
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    assert data["memory"]["total"] > sum(data["memory"][part] for part in parts)


def test_sizes_that_are_given_are_kept() -> None:
    sizes = {"tp": 8, "pp": 8, "vpp": 5, "micro_batch": 1, "recompute": "selective"}
    given = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())
    layout = planned(f"{SEVENTY} {given.replace('micro-batch', 'micro-batch-size')}")["layout"]
    assert layout == sizes | {"dp": 16}


def test_twice_the_mfu_is_half_the_days() -> None:
    slow, fast = (planned(f"{SEVENTY} --mfu {mfu}")["days"] for mfu in (0.25, 0.5))
    assert slow == pytest.approx(2 * fast)


def test_gpu_hours_are_days_of_all_gpus() -> None:
    data = planned(SEVENTY)
    assert data["gpu_hours"] == pytest.approx(data["days"] * 24 * 1024)
    assert f"{data['gpu_hours']:,.0f} GPU-hours" in output(SEVENTY)


def test_few_gpu_hours_are_not_rounded_to_one() -> None:
    assert "(1.4 GPU-hours)" in output("plan --model 125m")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("recipe 7b --norm LayerNorm", "'LayerNorm' is not one of 'DyT', 'RMSNorm'"),
        ("plan --model 7b --nodes 0", "0 is not in the range x>=1"),
        ("plan --model 7b --mfu 1.5", "1.5 is not in the range 0<x<=1"),
        ("plan --model 7b --mfu nan", "nan is not a finite number"),
        ("plan --model 7b --gpu-memory 0", "0.0 is not in the range x>0"),
        ("dry-run -- --bf16", "give one of --vocab-size and --tokenizer-model"),
        ("dry-run --vocab-size 8 --tokenizer-model t -- --bf16", "give one of"),
    ],
)
def test_wrong_use_is_refused(command: str, message: str) -> None:
    result = CliRunner().invoke(main, shlex.split(command))
    assert result.exit_code == 2
    assert message in result.output


def test_what_follows_two_dashes_is_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(dry_run, "run", lambda *sizes, **options: calls.append((*sizes, options)) or ["fine"])
    text = output("dry-run --nodes 2 --vocab-size 8 --files --parameters 5 -- --bf16 --nodes 3 -x")
    assert calls == [(("--bf16", "--nodes", "3", "-x"), 16, 8, {"files": True, "parameters": 5})]
    assert text == "fine\n"
