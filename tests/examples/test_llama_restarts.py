"""The launch scripts under Slurm and torchrun, both fakes: signals, requeues, and when a run is over."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from . import fakes

ROOT = Path(__file__).resolve().parents[2]
SAVE_THREE = """
    mkdir -p "$OUT/checkpoint/iter_0000003"; echo "{}" > "$OUT/checkpoint/iter_0000003/metadata.json"
    echo 3 > "$TRACKER"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "data.idx").touch()
    return tmp_path


def settings(home: Path, **more: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = f"{home / 'bin'}:{environment['PATH']}"
    data = {name: str(home / "data") for name in ("TRAIN_DATA", "VALID_DATA")}
    out = {"OUT": str(home / "run"), "TOKENIZER_MODEL": str(home / "data.idx")}
    return environment | data | out | fakes.python(home) | more | {"PATH": path}


def run(home: Path, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "examples/llama/7b.sh", *flags],
        **{"cwd": ROOT, "env": settings(home, **more), "capture_output": True, "text": True, "timeout": 60},
        check=False,
    )


def told(home: Path, name: str) -> str:
    path = home / name
    return path.read_text() if path.exists() else ""


def test_slurm_starts_a_task_a_gpu_with_torch_s_variables(home: Path) -> None:
    result = run(home, "--seed", "9", **fakes.slurm(home), FAKE_TRAIN='echo 10 > "$TRACKER"')
    assert result.returncode == 0, result.stderr
    lines = sorted(told(home, "python").splitlines())
    assert len(lines) == 4
    for rank, line in enumerate(lines):
        assert line.startswith(f"{rank}/4 {rank % 2} localhost -m megatron_dyt.pretrain --train-iters 10")
        assert line.endswith("--seed 9")
    assert "finished: all steps are in" in result.stdout
    assert "requeue" not in told(home, "scontrol")


def test_containers_are_for_looking_and_for_training(home: Path) -> None:
    image = "--container-image=dyt"
    run(home, **fakes.slurm(home), SRUN_FLAGS=image, FAKE_TRAIN='echo 10 > "$TRACKER"')
    calls = told(home, "srun").splitlines()
    assert len(calls) == 6  # recipe, plan, its flags, the extension, dry run, training
    assert all(image in call for call in calls)
    assert [call.split("--ntasks ")[1].split()[0] for call in calls] == [*"11111", "4"]


@pytest.mark.parametrize("code", [0, 1, 137])
def test_an_unfinished_run_is_requeued(home: Path, code: int) -> None:
    result = run(home, **fakes.slurm(home), FAKE_TRAIN=f"{SAVE_THREE} exit {code}")
    assert result.returncode == 0
    assert f"not finished (exit code {code}); requeued, it resumes from step 3" in result.stdout
    assert told(home, "scontrol").splitlines()[-1] == "requeue 17"


def test_wrong_input_is_not_requeued(home: Path) -> None:
    result = run(home, **fakes.slurm(home), FAKE_TRAIN="exit 2")
    assert result.returncode == 2
    assert "the input is wrong (see above); not requeued" in result.stderr
    assert "requeue" not in told(home, "scontrol")


def test_three_starts_without_progress_end_it(home: Path) -> None:
    job = fakes.slurm(home)
    assert run(home, **job, FAKE_TRAIN="exit 1").returncode == 0
    assert run(home, **job, FAKE_TRAIN=f"{SAVE_THREE} exit 1").returncode == 0  # Progress: counted anew.
    codes = [run(home, **job, FAKE_TRAIN="exit 1").returncode for _ in range(3)]
    assert codes == [0, 0, 2]
    assert told(home, "scontrol").count("requeue 17") == 4
    assert run(home, **job, FAKE_TRAIN="exit 1").returncode == 0  # Started again by hand.


def test_a_stop_file_keeps_a_job_from_being_requeued_once(home: Path) -> None:
    job = fakes.slurm(home)
    result = run(home, **job, FAKE_TRAIN=f'{SAVE_THREE} touch "$OUT/stop"')
    assert result.returncode == 0
    assert "not requeued, as" in result.stdout
    assert "requeue" not in told(home, "scontrol")
    assert run(home, **job, FAKE_TRAIN=SAVE_THREE).returncode == 0
    assert "requeue 17" in told(home, "scontrol")


def test_the_step_of_a_damaged_checkpoint_saved_anew_is_progress(home: Path) -> None:
    job = fakes.slurm(home)
    for _ in range(4):  # Each time 3 was damaged, 2 was loaded, and 3 is saved again.
        assert run(home, **job, FAKE_TRAIN=f"{SAVE_THREE} exit 1").returncode == 0
    assert not (home / "run/vain-starts").exists()


@pytest.mark.parametrize("flags", [["--train-iters", "3"], ["--train-iters=3"]])
def test_the_last_step_is_the_one_given_last(home: Path, flags: list[str]) -> None:
    result = run(home, *flags, **fakes.slurm(home), FAKE_TRAIN=SAVE_THREE)
    assert result.returncode == 0
    assert "finished: all steps are in" in result.stdout
    assert "requeue" not in told(home, "scontrol")


def test_without_slurm_it_says_how_to_go_on(home: Path) -> None:
    result = run(home, FAKE_TRAIN=f"{SAVE_THREE} exit 1")
    assert result.returncode == 2
    assert "stopped before the last step (exit code 1). Start it again" in result.stderr
    assert run(home, FAKE_TRAIN='echo 10 > "$TRACKER"').returncode == 0


def test_several_nodes_by_hand(home: Path) -> None:
    result = run(home, NODES="2", FAKE_TRAIN="exit 9")
    assert "NODES=2 without Slurm needs NODE_RANK (0 to 1) and MASTER_ADDR" in result.stderr
    result = run(home, NODES="2", NODE_RANK="1", MASTER_ADDR="head", FAKE_TRAIN='echo 10 > "$TRACKER"')
    assert result.returncode == 0
    assert "dry run" not in result.stdout  # One node says it for all.
    assert "--nnodes 2 --node-rank 1 --master-addr head --master-port 29500" in told(home, "python")


# What torchrun does: it starts a process, and told to end, kills it before it has saved.
TORCHRUN = f"""
trap 'touch "$FAKE_HOME/told"; kill -KILL $worker; exit 1' TERM
(trap 'sleep 0.5; {SAVE_THREE} exit 0' TERM; touch "$FAKE_HOME/up"; while :; do sleep 0.05; done) &
worker=$!
wait $worker
"""


def test_sigterm_reaches_the_training_and_not_torchrun(home: Path) -> None:
    process = subprocess.Popen(
        ["bash", "examples/llama/7b.sh"],
        **{"cwd": ROOT, "env": settings(home, FAKE_TRAIN=TORCHRUN), "text": True},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 300
    while not (home / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=300)
    assert "SIGTERM: saving a checkpoint" in out
    assert "stopped before the last step (exit code 0)" in errors
    assert told(home, "run/checkpoint/latest_checkpointed_iteration.txt") == "3\n"
    assert not (home / "told").exists()


def test_a_prepared_directory_becomes_its_blend(home: Path) -> None:
    (home / "prepared").mkdir()
    result = run(home, TRAIN_DATA=str(home / "prepared"), FAKE_TRAIN='echo 10 > "$TRACKER"')
    assert result.returncode == 0, result.stderr
    assert "--train-data-path 0.25 some/prefix 0.75 other/prefix --valid-data-path" in told(home, "python")


def test_looking_first_prints_what_would_run(home: Path) -> None:
    (home / "prepared").mkdir()
    result = run(home, TRAIN_DATA=str(home / "prepared"), PLAN_ONLY="1")
    assert result.returncode == 0, result.stderr
    assert "--train-data-path 0.25 some/prefix 0.75 other/prefix --valid-data-path" in result.stdout


def test_weights_and_biases(home: Path) -> None:
    run(home, FAKE_TRAIN="exit 1")
    assert "--wandb" not in told(home, "python")
    run(home, FAKE_TRAIN="exit 1", WANDB_PROJECT="dyt", NORM="RMSNorm")
    assert "--wandb-project dyt --wandb-exp-name llama-7b-RMSNorm --wandb-save-dir" in told(home, "python")


KEEP_LOCK = 'cp "$OUT/lock" "$FAKE_HOME/held"; echo 10 > "$TRACKER"'


@pytest.mark.parametrize(
    ("lock", "held"),
    [
        ("job 17", False),  # requeued
        ("job 18", False),
        ("job 19", True),
        (f"host {socket.gethostname()} {os.getpid()}", True),
        (f"host {socket.gethostname()} 999999999", False),
        ("host elsewhere 1", True),
    ],
    # Not by the values: the processes of `pytest -n` must name the tests alike.
    ids=["own job", "ended job", "running job", "running process", "ended process", "other host"],
)
def test_two_runs_do_not_share_a_directory(home: Path, lock: str, held: bool) -> None:
    (home / "run").mkdir()
    (home / "run/lock").write_text(f"{lock}\n")
    (home / "queue").write_text("19\n")
    result = run(home, **fakes.slurm(home), FAKE_TRAIN=KEEP_LOCK)
    if held:
        assert result.returncode == 2
        assert f"error: {lock} trains into {home / 'run'}" in result.stderr
        assert told(home, "run/lock") == f"{lock}\n"
        assert told(home, "python") == ""
    else:
        assert result.returncode == 0, result.stderr
        assert told(home, "held") == "job 17\n"
        assert not (home / "run/lock").exists()


def test_without_slurm_a_process_holds_the_lock(home: Path) -> None:
    result = run(home, FAKE_TRAIN=KEEP_LOCK)
    assert result.returncode == 0, result.stderr
    assert told(home, "held").startswith(f"host {socket.gethostname()} ")
    other = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head", "FAKE_TRAIN": "exit 0"}
    assert run(home, **other).returncode == 0  # Node 0 holds it for all.
    assert not (home / "run/lock").exists()
