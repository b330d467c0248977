"""The launch scripts by hand, around a fake of torchrun but in one test: signals, locks, how a run ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ports import free_port

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


@pytest.mark.parametrize("flags", [["--train-iters", "3"], ["--train-iters=3"]])
def test_the_last_step_is_the_one_given_last(home: Path, flags: list[str]) -> None:
    result = run(home, *flags, FAKE_TRAIN=SAVE_THREE)
    assert result.returncode == 0
    assert "finished: all steps are in" in result.stdout


def test_without_slurm_it_says_how_to_go_on(home: Path) -> None:
    result = run(home, FAKE_TRAIN=f"{SAVE_THREE} exit 1")
    assert result.returncode == 1
    assert "stopped before the last step (exit code 1). Start it again" in result.stderr
    assert run(home, FAKE_TRAIN='echo 10 > "$TRACKER"').returncode == 0


def test_an_interpreter_without_the_package_is_refused(home: Path) -> None:
    failing = 'echo Traceback; echo "ModuleNotFoundError: No module" >&2; exit 1'
    result = run(home, FAKE_IMPORT=failing)
    assert result.returncode == 2
    python = home / "bin" / "python"
    assert f"error: {python} cannot import megatron_dyt (ModuleNotFoundError: No module)" in result.stderr
    assert f"Run make setup in {ROOT}, or set PY=..." in result.stderr
    assert not (home / "run").exists()


def test_a_job_with_containers_does_not_ask_for_it_outside(home: Path) -> None:
    fakes.command(home, "srun", 'while [ "$1" != bash ]; do shift; done; exec "$@"')
    job = {"SLURM_JOB_ID": "1", "SRUN_FLAGS": "--container-image=some", "PLAN_ONLY": "1"}
    result = run(home, **job, FAKE_IMPORT="exit 1")
    assert result.returncode == 0, result.stderr


def test_the_interpreter_is_the_checkouts(home: Path) -> None:
    """Wherever the script is started."""
    scripts = home / "checkout" / "examples" / "llama"
    shutil.copytree(ROOT / "examples" / "llama", scripts)
    environment = settings(home, FAKE_TRAIN='echo "$0" > "$FAKE_HOME/interpreter"; echo 10 > "$TRACKER"')
    python = home / "checkout" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy(environment.pop("PY"), python)
    command = ["bash", os.path.relpath(scripts / "7b.sh", home)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert told(home, "interpreter") == f"{python}\n"


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
    assert "told to end: saving a checkpoint" in out
    assert "stopped before the last step (exit code 0)" in errors
    assert told(home, "run/checkpoint/latest_checkpointed_iteration.txt") == "3\n"
    assert not (home / "told").exists()


# torchrun itself; what it starts is $FAKE_TRAIN, in as many processes.
REAL_TORCHRUN = f"""
words=("$@"); ours=(); for word in "${{words[@]}}"; do
  [ "$word" != megatron_dyt.pretrain ] || break; ours+=("$word"); done
unset 'ours[-1]'
exec {sys.executable} "${{ours[@]}}" --no-python bash -c "$FAKE_RANK"
"""
# As Megatron's: told to one rank, SIGTERM is known to all, which save and end.
RANK_UNTIL_SIGTERM = f"""
trap 'touch "$FAKE_HOME/signalled"' TERM
TRACKER=$OUT/checkpoint/latest_checkpointed_iteration.txt
touch "$FAKE_HOME/up$RANK"
until [ -e "$FAKE_HOME/signalled" ]; do sleep 0.05; done
sleep 1; {SAVE_THREE} exit 0
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_for_the_group_of_one_node_ends_both(home: Path) -> None:
    """`timeout`, a terminal and kill -- -PGID signal all that are in it. A torchrun that heard it would end
    with an error, and that of the other node would wait for it, five minutes after its ranks have ended."""
    world = {"NODES": "2", "GPUS_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    fake = {"FAKE_TRAIN": REAL_TORCHRUN, "FAKE_RANK": RANK_UNTIL_SIGTERM, "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            ["bash", "examples/llama/7b.sh"],
            **{"cwd": ROOT, "env": settings(home, **world, **fake, NODE_RANK=str(rank)), "text": True},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for rank in (0, 1)
    ]
    deadline = time.monotonic() + 300
    while not ((home / "up0").exists() and (home / "up1").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(nodes[1].pid, signal.SIGTERM)
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert "told to end: saving a checkpoint" in said[1]
    for out in said:
        assert "stopped before the last step (exit code 0)" in out
    assert not (home / "run/lock").exists()


@pytest.mark.parametrize("looking", [{}, {"PLAN_ONLY": "1"}], ids=["training", "looking"])
def test_a_prepared_directory_becomes_its_blend(home: Path, looking: dict[str, str]) -> None:
    (home / "prepared").mkdir()
    result = run(home, TRAIN_DATA=str(home / "prepared"), FAKE_TRAIN='echo 10 > "$TRACKER"', **looking)
    assert result.returncode == 0, result.stderr
    flags = result.stdout if looking else told(home, "python")
    assert "--train-data-path 0.25 some/prefix 0.75 other/prefix --valid-data-path" in flags


def test_weights_and_biases(home: Path) -> None:
    run(home, FAKE_TRAIN="exit 1")
    assert "--wandb" not in told(home, "python")
    run(home, FAKE_TRAIN="exit 1", WANDB_PROJECT="dyt", NORM="RMSNorm")
    assert "--wandb-project dyt --wandb-exp-name llama-7b-RMSNorm --wandb-save-dir" in told(home, "python")


KEEP_LOCK = 'cp "$OUT/lock" "$FAKE_HOME/held"; echo 10 > "$TRACKER"'


@pytest.mark.parametrize(
    ("lock", "held"),
    [
        (f"host {socket.gethostname()} {os.getpid()}", True),
        (f"host {socket.gethostname()} 999999999", False),
        ("host elsewhere 1", True),
    ],
    # Not by the values: the processes of `pytest -n` must name the tests alike.
    ids=["running process", "ended process", "other host"],
)
def test_two_runs_do_not_share_a_directory(home: Path, lock: str, held: bool) -> None:
    (home / "run").mkdir()
    (home / "run/lock").write_text(f"{lock}\n")
    result = run(home, FAKE_TRAIN=KEEP_LOCK)
    if held:
        assert result.returncode == 2
        assert f"error: {lock} trains into {home / 'run'}" in result.stderr
        assert told(home, "run/lock") == f"{lock}\n"
        assert told(home, "python") == ""
    else:
        assert result.returncode == 0, result.stderr
        assert told(home, "held").startswith(f"host {socket.gethostname()} ")
        assert not (home / "run/lock").exists()


def test_of_two_starts_that_find_a_job_gone_one_takes_over(home: Path) -> None:
    (home / "run").mkdir()
    (home / "run/lock").write_text("job 1\n")
    fakes.command(home, "squeue", 'echo "Invalid job id"; echo "host quicker 1" > "$OUT/lock"')
    result = run(home, FAKE_TRAIN=KEEP_LOCK)
    assert result.returncode == 2
    assert "error: host quicker 1 trains into" in result.stderr
    assert told(home, "run/lock") == "host quicker 1\n"
    assert not (home / "run/lock.turn").exists()


def test_without_slurm_a_process_holds_the_lock(home: Path) -> None:
    result = run(home, FAKE_TRAIN=KEEP_LOCK)
    assert result.returncode == 0, result.stderr
    assert told(home, "held").startswith(f"host {socket.gethostname()} ")
    other = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "head", "FAKE_TRAIN": "exit 0"}
    assert run(home, **other).returncode == 0  # Node 0 holds it for all.
    assert not (home / "run/lock").exists()
