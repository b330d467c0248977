"""The 125M run of the GPU hour: how many steps it decides on."""

import argparse
import importlib
import json
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("milliseconds", [37, 93, 400])
def test_the_last_step_is_one_that_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, milliseconds: int
) -> None:
    """By the last logged step a later call sees that a run has ended."""
    train = importlib.import_module("train")
    monkeypatch.setattr(train, "train", lambda *_: None)
    monkeypatch.setattr(train, "step_seconds", lambda _: milliseconds / 1e3)
    args = argparse.Namespace(output=tmp_path, seconds=100.0, rehearse=False)
    steps = train.count_steps(args, time.monotonic())
    assert steps >= train.TRIAL
    assert steps % train.log_interval(steps) == 0
    assert json.loads((tmp_path / "steps").read_text()) == steps
