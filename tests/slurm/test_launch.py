"""What a job starts: ranks on two nodes, as many as GPUs were asked for; what it refuses to start."""

from pathlib import Path

import pytest

from tests.slurm.conftest import ALL_STEPS, Cluster

# What each rank is, and what Slurm lets it see.
REPORT = f"""
    echo "$RANK/$WORLD_SIZE $LOCAL_RANK $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES" > "$FAKE_HOME/rank$RANK"
    {ALL_STEPS}
"""


def reports(home: Path) -> list[str]:
    return [path.read_text().strip() for path in sorted(home.glob("rank*"))]


def test_two_nodes_have_a_rank_per_gpu(cluster: Cluster, tmp_path: Path, faked: dict[str, str]) -> None:
    job = cluster.submit(tmp_path, "--nodes", "2", flags=("--seed", "9"), **faked, FAKE_TRAIN=REPORT)
    assert job.wait() == 0, job.text()
    places = ["0/4 0 dytnode1", "1/4 1 dytnode1", "2/4 0 dytnode2", "3/4 1 dytnode2"]
    assert reports(tmp_path) == [f"{place} 0,1" for place in places]
    for line in (tmp_path / "python").read_text().splitlines():
        assert " dytnode1 -m megatron_dyt.pretrain --train-iters 10" in line
        assert line.endswith("--seed 9")
    assert "finished: all steps are in" in job.text()
    assert job.field("Restarts") == "0"


@pytest.mark.parametrize(
    ("asked", "gpus"),
    [
        ("--gpus-per-node=h100:4", 4),
        ("--gpus-per-node=4 --gres=gpu:4", 4),
        ("--gpus-per-node=h100", 1),
        ("--gpus-per-node=3", 3),
    ],
)
def test_planned_and_started_are_the_gpus_asked_for(
    asked: str, gpus: int, cluster: Cluster, tmp_path: Path, faked: dict[str, str]
) -> None:
    """Although --exclusive gives the batch script all eight of the node."""
    job = cluster.submit(tmp_path, *asked.split(), **faked, FAKE_TRAIN=REPORT)
    assert job.wait() == 0, job.text()
    assert f"dry-run --nodes 1 --gpus-per-node {gpus} " in job.text()
    visible = ",".join(map(str, range(gpus)))
    assert reports(tmp_path) == [f"{rank}/{gpus} {rank} dytnode1 {visible}" for rank in range(gpus)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"NODES": "3"}, "NODES=3, and the job has 1"),
        ({"GPUS_PER_NODE": "4"}, "GPUS_PER_NODE=4, and the job asked for 2"),
    ],
    ids=["nodes", "GPUs"],
)
def test_settings_that_contradict_the_job_are_refused(
    settings: dict[str, str], message: str, cluster: Cluster, tmp_path: Path, faked: dict[str, str]
) -> None:
    job = cluster.submit(tmp_path, **faked, **settings, FAKE_TRAIN=ALL_STEPS)
    assert job.wait() == 2, job.text()
    assert message in job.text()
    assert not (tmp_path / "python").exists()


def test_looking_and_training_are_where_srun_s_flags_say(
    cluster: Cluster, tmp_path: Path, faked: dict[str, str]
) -> None:
    """Which is in a container, usually; here it is a variable that only steps have."""
    shown = "is in ${INSIDE:-nothing}"
    settings = faked | {
        "SRUN_FLAGS": "--export=ALL,INSIDE=container",
        "FAKE_DRY_RUN": f'echo "dry run {shown}"',
    }
    job = cluster.submit(tmp_path, **settings, FAKE_TRAIN=f'echo "rank $RANK {shown}"; {ALL_STEPS}')
    assert job.wait() == 0, job.text()
    for who in ("dry run", "rank 0", "rank 1"):
        assert job.text().count(f"{who} is in container") == 1


def test_a_job_may_be_submitted_from_another_directory(
    cluster: Cluster, tmp_path: Path, faked: dict[str, str]
) -> None:
    flags = ("--data-cache-path", str(tmp_path / "cache"))  # Slurm tells the script with its arguments.
    job = cluster.submit(tmp_path, cwd=tmp_path, flags=flags, **faked, FAKE_TRAIN=ALL_STEPS)
    assert job.wait() == 0, job.text()


def test_a_job_may_be_submitted_from_standard_input(
    cluster: Cluster, tmp_path: Path, faked: dict[str, str]
) -> None:
    job = cluster.submit(tmp_path, piped=True, **faked, FAKE_TRAIN=ALL_STEPS)
    assert job.wait() == 0, job.text()


@pytest.mark.parametrize("held", [False, True], ids=["an ended job", "a queued job"])
def test_two_jobs_do_not_share_a_directory(
    held: bool, cluster: Cluster, tmp_path: Path, faked: dict[str, str]
) -> None:
    other = cluster.submit(tmp_path, *["--hold"] * held, **faked, FAKE_TRAIN=ALL_STEPS)
    if not held:
        other.wait()
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/lock").write_text(f"job {other.number}\n")
    keep = f'cp "$OUT/lock" "$FAKE_HOME/held"; {ALL_STEPS}'
    job = cluster.submit(tmp_path, **faked, FAKE_TRAIN=keep)
    if held:
        assert job.wait() == 2, job.text()
        assert f"error: job {other.number} trains into {tmp_path / 'run'}" in job.text()
        assert (tmp_path / "run/lock").read_text() == f"job {other.number}\n"
        cluster.call("scancel", other.number)
    else:
        assert job.wait() == 0, job.text()
        assert (tmp_path / "held").read_text() == f"job {job.number}\n"
        assert not (tmp_path / "run/lock").exists()
