"""What arrives in TensorBoard and Weights & Biases: event files and offline runs read back."""

import importlib
import importlib.util
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.mcore import trackers

Run = Callable[[list[str]], SimpleNamespace]

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
LOOP = pytest.mark.needs("training_loop")


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in TensorBoard's event files by tag: (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def offline_records(file: Path) -> Iterator[Any]:
    """The records of an offline W&B run: protocol buffers in LevelDB's log format, behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, text = file.read_bytes(), 7, b""
    while place + 7 < len(data):
        if 32768 - place % 32768 < 7:  # The end of a block, where no header fits.
            place += 32768 - place % 32768
        length, kind = struct.unpack_from("<HB", data, place + 4)
        text += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # Whole, or the last of several parts.
            record = wandb_internal_pb2.Record()
            record.ParseFromString(text)
            text = b""
            yield record


def offline_run(file: Path) -> tuple[str, dict[int, dict[str, Any]]]:
    """(id of the run, what was logged by step)."""
    name, steps = "", {}
    for record in offline_records(file):
        if record.WhichOneof("record_type") == "run":
            name = record.run.run_id
        elif record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            steps[record.history.step.num] = items
    return name, steps


@LOOP
@needs_wandb
def test_a_resumed_run_is_one_in_wandb_and_both_have_the_numbers_of_dyt(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    save = tmp_path / "save"
    flags = [
        "--normalization",
        "DyT",
        "--dyt-stats-interval",
        "2",
        "--save",
        str(save),
        "--save-interval",
        "2",
    ]
    flags += ["--load", str(save), "--tensorboard-dir", str(tmp_path / "tb")]
    flags += ["--wandb-project", "p", "--wandb-exp-name", "e", "--override-opt_param-scheduler"]
    for steps, job in (("2", "first"), ("4", "second")):
        monkeypatch.setenv("SLURM_JOB_NAME", job)
        megatron_run([*tiny_llama, *flags, "--train-iters", steps])
        importlib.import_module("wandb").teardown()  # It reads its variables once in a process.

    runs = [offline_run(file) for file in sorted(save.glob("wandb/wandb/offline-run-*/*.wandb"))]
    assert [name for name, _ in runs] == [(save / "wandb_run_id.txt").read_text().strip()] * 2
    in_wandb = runs[0][1] | runs[1][1]
    in_tensorboard = scalars(tmp_path / "tb")
    assert [step for step, _ in in_tensorboard["lm loss"]] == [1, 2, 3, 4]
    written = [json.loads(line) for line in (save / "dyt_stats.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in written] == [1, 2, 4]
    for line in written:
        expected = {"dyt-embedding-scale": line["embedding_scale"]}
        for title, field in (("alpha", "alpha"), ("std", "input_std"), ("saturated", "saturated")):
            for site in line["sites"]:
                expected[f"dyt-{title}-{site['role']}/{site['name']}"] = site[field]
            of_ffn = [site[field] for site in line["sites"] if site["role"] == "ffn"]
            expected[f"dyt-{title}/ffn"] = sum(of_ffn) / 2
        for tag, value in expected.items():
            assert in_wandb[line["iteration"]][tag] == pytest.approx(value)
            assert dict(in_tensorboard[tag])[line["iteration"]] == pytest.approx(value, rel=1e-6)  # fp32


@LOOP
@pytest.mark.parametrize("space", [0, 20])
def test_a_full_disk_does_not_end_training_by_tensorboard(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, space: int
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    written = []

    def full(self: RecordWriter, data: bytes) -> None:
        written.append(data)
        if len(written) > space:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    monkeypatch.setattr("threading.excepthook", lambda _args: None)
    run = megatron_run([*tiny_llama, "--tensorboard-dir", str(tmp_path)])
    assert len(run.losses) == 4
    assert run.log.count("cannot be written ([Errno 28] No space left on device); training goes on") == 1


def flags(**given: Any) -> SimpleNamespace:
    nothing = {"tensorboard_dir": None, "wandb_project": "", "wandb_exp_name": "", "wandb_save_dir": ""}
    return SimpleNamespace(**nothing | {"save": None, "load": None, "finetune": False} | given)


WANDB = {"wandb_project": "p", "tensorboard_dir": "t", "wandb_exp_name": "e", "save": "s"}


@pytest.mark.parametrize(
    ("given", "absent", "words"),
    [
        (WANDB | {"tensorboard_dir": None}, "", "--wandb-project p was given without --tensorboard-dir"),
        (WANDB, "tensorboard", "needs the package tensorboard.*Weights & Biases neither"),
        ({"tensorboard_dir": "t"}, "tensorboard", "needs the package tensorboard"),
        (WANDB, "wandb", "needs the package wandb"),
        (WANDB | {"wandb_exp_name": ""}, "", "needs --wandb-exp-name"),
        (WANDB | {"save": None}, "", "needs --wandb-save-dir"),
    ],
)
def test_what_would_arrive_nowhere_is_refused(
    given: dict[str, Any], absent: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_is_there", lambda package: package != absent)
    with pytest.raises(UserError, match=words):
        trackers.check(flags(**given))
    monkeypatch.setattr(trackers, "_is_there", lambda package: True)
    trackers.check(flags(**WANDB))
    trackers.check(flags())


def test_wandb_s_variable_without_the_flag_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "p")
    trackers.check(flags())
    assert "WARNING: WANDB_PROJECT is set" in capsys.readouterr().out


@needs_wandb
def test_a_refusal_of_wandb_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(args: object) -> None:
        raise RuntimeError("No API key configured")

    with pytest.raises(UserError, match=r"No API key configured.*WANDB_MODE=offline"):
        trackers.wrap_wandb_writer(refuses)(flags(**WANDB, rank=1, world_size=2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tracker", "more", "environment", "expected"),
    [
        ("2", {}, {}, ("kept", "allow")),
        (None, {}, {}, (None, None)),  # From the start again: another run.
        ("2", {"finetune": True}, {}, (None, None)),
        ("2", {}, {"WANDB_RUN_ID": "mine"}, ("mine", None)),
    ],
)
def test_the_run_is_taken_up_where_training_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tracker: str | None,
    more: dict[str, Any],
    environment: dict[str, str],
    expected: tuple[str | None, str | None],
) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / trackers.RUN_ID_FILE).write_text("kept\n")
    if tracker:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    seen: list[tuple[str | None, str | None]] = []
    monkeypatch.setattr(trackers, "_keep", lambda file: None)
    start = trackers.wrap_wandb_writer(
        lambda args: seen.append((os.environ.get("WANDB_RUN_ID"), os.environ.get("WANDB_RESUME")))
    )
    given = {**WANDB, "save": str(tmp_path), "load": str(tmp_path), "rank": 0, "world_size": 1, **more}
    start(flags(**given))  # type: ignore[arg-type]
    assert seen == [expected]
    assert os.environ.get("WANDB_RUN_ID") == environment.get("WANDB_RUN_ID")
