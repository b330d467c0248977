"""When a job ends, is requeued, or is not: signals, time limits, faults, wrong input, the stop file."""

from pathlib import Path

import pytest

from tests.slurm.conftest import ALL_STEPS, Cluster, Job, faked_settings

SAVE_THREE = """
    mkdir -p "$OUT/checkpoint/iter_0000003"; echo "{}" > "$OUT/checkpoint/iter_0000003/metadata.json"
    echo 3 > "$TRACKER"
"""
# A rank that trains until SIGTERM, then saves and ends with 0, as Megatron's do.
UNTIL_SIGTERM = f"trap '{SAVE_THREE} exit 0' TERM; echo \"rank $RANK trains\"; while :; do sleep 0.05; done"


def first_then_all(first: str) -> str:
    """Training whose first start is `first`; later ones do the rest of the steps."""
    return f'if [ -z "${{SLURM_RESTART_COUNT:-}}" ]; then {first}; else {ALL_STEPS}; fi'


# --- what ends by itself: submitted together, as a requeued job waits for some seconds ---------------------

# Options of sbatch, and what the ranks do. The time limit's signal comes within the first half minute: 110 s
# before the end of 120, which the script does not know.
ALONE = {
    "stopped in the queue": ([], first_then_all(f"{SAVE_THREE} exit 1")),
    "0": ([], first_then_all(f"{SAVE_THREE} exit 0")),
    # A checkpoint that is damaged each time, and saved anew, is progress.
    "saved anew": (
        [],
        f'if [ "${{SLURM_RESTART_COUNT:-0}}" -lt 3 ]; then {SAVE_THREE} exit 1; fi; {ALL_STEPS}',
    ),
    "137": ([], first_then_all(f"{SAVE_THREE} kill -KILL $$")),
    "a rank is killed": (["--nodes", "2"], first_then_all(f'{SAVE_THREE} [ "$RANK" != 3 ] || kill -KILL $$')),
    "no requeue": (["--no-requeue"], f"{SAVE_THREE} exit 0"),
    "in vain": ([], "exit 1"),
    "time limit": (["--nodes", "2", "--time", "2", "--signal", "TERM@110"], first_then_all(UNTIL_SIGTERM)),
    "stop file left": ([], first_then_all(f"{SAVE_THREE} exit 1")),
    # The others are killed, as those are that wait for a rank which has left.
    "wrong input": (["--nodes", "2"], 'if [ "$RANK" = 3 ]; then exit 2; else kill -KILL $$; fi'),
    "short": (["--time", "10"], ALL_STEPS),
}


@pytest.fixture(scope="module")
def alone(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """The jobs of `ALONE`, submitted."""
    jobs = {}
    for name, (options, train) in ALONE.items():
        home = tmp_path_factory.mktemp("job")
        settings = {"SIGNAL_LEAD": "50"} if name == "time limit" else {}
        (home / "run").mkdir()
        if name == "in vain":  # An earlier job's, which does not count.
            (home / "run/vain-starts").write_text("2\n")
        if name == "stop file left":
            (home / "run/stop").touch()
        jobs[name] = cluster.submit(home, *options, **settings, **faked_settings(home), FAKE_TRAIN=train)
    return jobs


# The first test: it has to come while the job waits in the queue again.
def test_a_stop_file_made_in_the_queue_ends_a_requeued_job(alone: dict[str, Job]) -> None:
    job = alone["stopped in the queue"]
    job.until(lambda: job.field("Restarts") == "1", "the requeue")
    (job.log.parent / "run/stop").touch()
    assert job.wait() == 0, job.text()
    assert "not started, as" in job.text()
    assert "finished: all steps" not in job.text()


# Of the others: exit code, restarts, and what is said.
ENDS = {
    "0": (0, 1, "not finished (exit code 0); requeued, it resumes from step 3"),
    "137": (0, 1, "not finished (exit code 137); requeued, it resumes from step 3"),
    "a rank is killed": (0, 1, "requeued, it resumes from step 3"),
    "time limit": (0, 1, "requeued, it resumes from step 3"),
    "stop file left": (0, 1, ""),
    "saved anew": (0, 3, ""),
    "no requeue": (1, 0, "not finished (exit code 0), and Slurm does not requeue this job"),
    "in vain": (1, 2, "three starts in a row brought no new checkpoint"),
    "wrong input": (2, 0, "the input is wrong (see above); not requeued"),
    "short": (2, 0, "--time of 10 minutes leaves no time to train"),
}


@pytest.mark.parametrize("name", ENDS)
def test_how_a_job_ends(name: str, alone: dict[str, Job]) -> None:
    job, (code, restarts, said) = alone[name], ENDS[name]
    assert job.wait() == code, job.text()
    assert job.field("Restarts") == str(restarts)
    assert said in job.text()
    assert ("finished: all steps are in" in job.text()) == (code == 0)


# --- what somebody ends --------------------------------------------------------------------------------


def test_stopped_for_good(cluster: Cluster, tmp_path: Path, faked: dict[str, str]) -> None:
    job = cluster.submit(tmp_path, **faked, FAKE_TRAIN=UNTIL_SIGTERM)
    job.wait_for("rank 1 trains")
    (tmp_path / "run/stop").touch()
    cluster.call("scancel", "--signal=TERM", job.number)
    assert job.wait() == 0, job.text()
    assert "not requeued, as" in job.text()
    assert not (tmp_path / "run/stop").exists()


def test_stopped_while_it_plans(cluster: Cluster, tmp_path: Path, faked: dict[str, str]) -> None:
    """There is no step yet, so Slurm drops the signal; the file alone says it."""
    settings = {"FAKE_DRY_RUN": 'until [ -e "$FAKE_HOME/planned" ]; do sleep 0.1; done'}
    job = cluster.submit(tmp_path, **faked, **settings, FAKE_TRAIN=ALL_STEPS)
    job.wait_for("dry-run")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/stop").touch()
    cluster.call("scancel", "--signal=TERM", job.number)
    (tmp_path / "planned").touch()
    assert job.wait() == 0, job.text()
    assert "not started, as" in job.text()
    assert not (tmp_path / "run/stop").exists()
    assert not (tmp_path / "python").exists()


def test_a_job_does_not_start_when_the_signal_came_while_it_planned(
    cluster: Cluster, tmp_path: Path, faked: dict[str, str]
) -> None:
    settings = {"SIGNAL_LEAD": "59", "FAKE_DRY_RUN": "sleep 2"}
    job = cluster.submit(tmp_path, "--time", "2", **faked, **settings, FAKE_TRAIN=ALL_STEPS)
    job.until(lambda: job.field("Restarts") == "1", "the requeue")
    cluster.call("scancel", job.number)
    assert "not finished (no time is left to train); requeued" in job.text()
    assert not (tmp_path / "python").exists()


def test_a_cancelled_job_holds_its_lock_until_the_ranks_have_saved(
    cluster: Cluster, tmp_path: Path, faked: dict[str, str]
) -> None:
    slow = f"""trap 'sleep 1; cp "$OUT/lock" "$FAKE_HOME/held"; {SAVE_THREE} exit 0' TERM
        echo "rank $RANK trains"; while :; do sleep 0.05; done"""
    job = cluster.submit(tmp_path, **faked, FAKE_TRAIN=slow)
    job.wait_for("rank 1 trains")
    cluster.call("scancel", job.number)
    job.wait()
    assert job.field("JobState") == "CANCELLED"
    assert (tmp_path / "held").read_text() == f"job {job.number}\n"
    job.until(lambda: not (tmp_path / "run/lock").exists(), "the lock's removal")
    assert "Slurm is ending the job" in job.text()


def test_a_preempted_job_saves_within_its_grace_time_and_is_requeued(
    cluster: Cluster, tmp_path: Path, faked: dict[str, str]
) -> None:
    train = first_then_all(UNTIL_SIGTERM)
    job = cluster.submit(tmp_path, "--partition", "spare", "--nodes", "2", **faked, FAKE_TRAIN=train)
    job.wait_for("rank 3 trains")
    cluster.call("srun", "--partition", "urgent", "--exclusive", "true", cwd=tmp_path)
    assert job.wait() == 0, job.text()
    assert job.field("Restarts") == "1"
    assert "it resumes from step 3" in job.text()
    assert "finished: all steps are in" in job.text()
