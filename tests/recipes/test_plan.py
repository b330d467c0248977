"""The plan command's three formats."""

import json

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.recipes.plan import main

SEVENTY = ["--model", "70b", "--nodes", "128", "--gpus-per-node", "8", "--gpu-memory", "80"]


def test_text_has_the_layout_with_reasons_memory_bubble_and_days(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SEVENTY) == 0
    text = capsys.readouterr().out
    for part in (
        "layout: TP ",
        "why: ",
        "optimizer (fp32, over DP",
        "bubble ",
        "4.19M tokens",
        " days at 40% MFU",
    ):
        assert part in text


def test_json_and_flags_agree(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SEVENTY, "--format", "json"])
    data = json.loads(capsys.readouterr().out)
    main([*SEVENTY, "--format", "flags"])
    assert capsys.readouterr().out.split() == data["flags"]
    sizes = data["layout"]
    assert sizes["tp"] * sizes["pp"] * sizes["dp"] == 1024
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    assert data["memory"]["total"] > sum(data["memory"][part] for part in parts)


def test_twice_the_mfu_is_half_the_days(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for mfu in ("0.25", "0.5"):
        main([*SEVENTY, "--format", "json", "--mfu", mfu])
        found.append(json.loads(capsys.readouterr().out)["days"])
    assert found[0] == pytest.approx(2 * found[1])


def test_gpu_hours_are_days_of_all_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SEVENTY, "--format", "json"])
    data = json.loads(capsys.readouterr().out)
    assert data["gpu_hours"] == pytest.approx(data["days"] * 24 * 1024)
    main(SEVENTY)
    assert f"{data['gpu_hours']:,.0f} GPU-hours" in capsys.readouterr().out


def test_few_gpu_hours_are_not_rounded_to_one(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "125m"])
    assert "(1.4 GPU-hours)" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [["--mfu", "1.5"], ["--gpu-memory", "0"]])
def test_impossible_numbers_are_refused(bad: list[str]) -> None:
    with pytest.raises(UserError, match="must be positive, and the MFU at most 1"):
        main([*SEVENTY, *bad])
