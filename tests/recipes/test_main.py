"""The recipe command."""

import shlex

import pytest

from megatron_dyt.recipes import load, names
from megatron_dyt.recipes.__main__ import main


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert listed == [f"{name}:" for name in names()]


def test_text_has_notes_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    main(["34b"])
    text = capsys.readouterr().out
    assert "note: rope_base" in text
    assert "--num-layers 48" in text


@pytest.mark.parametrize("norm", ["DyT", "RMSNorm"])
def test_flags_are_the_recipes(norm: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["7b", "--norm", norm, "--format", "flags"])
    assert shlex.split(capsys.readouterr().out) == load("7b").flags(norm)
