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


@pytest.mark.parametrize("code", [0, 137])
def test_an_unfinished_run_is_requeued(code: int, alone: dict[str, Job]) -> None:
    job = alone[str(code)]
    assert job.wait() == 0, job.text()
    assert job.field("Restarts") == "1"
    assert f"not finished (exit code {code}); requeued, it resumes from step 3" in job.text()
    assert "finished: all steps are in" in job.text()


@pytest.mark.parametrize("name", ["a rank is killed", "time limit"])
def test_so_is_one_that(name: str, alone: dict[str, Job]) -> None:
    job = alone[name]
    assert job.wait() == 0, job.text()
    assert job.field("Restarts") == "1"
    assert "requeued, it resumes from step 3" in job.text()
    assert "finished: all steps are in" in job.text()


def test_a_step_saved_once_more_is_progress(alone: dict[str, Job]) -> None:
    job = alone["saved anew"]
    assert job.wait() == 0, job.text()
    assert job.field("Restarts") == "3"


def test_a_job_without_requeue_says_so(alone: dict[str, Job]) -> None:
    job = alone["no requeue"]
    assert job.wait() == 1, job.text()
    assert "not finished (exit code 0), and Slurm does not requeue this job" in job.text()


def test_three_starts_without_progress_end_it(alone: dict[str, Job]) -> None:
    job = alone["in vain"]
    assert job.wait() == 1, job.text()
    assert job.field("Restarts") == "2"
    assert "three starts in a row brought no new checkpoint" in job.text()


def test_wrong_input_on_one_rank_ends_the_job_with_2(alone: dict[str, Job]) -> None:
    job = alone["wrong input"]
    assert job.wait() == 2, job.text()
    assert job.field("Restarts") == "0"
    assert "the input is wrong (see above); not requeued" in job.text()


def test_a_stop_file_of_an_earlier_job_stops_nothing(alone: dict[str, Job]) -> None:
    job = alone["stop file left"]
    assert job.wait() == 0, job.text()
    assert job.field("Restarts") == "1"
    assert "finished: all steps are in" in job.text()


def test_a_time_limit_shorter_than_the_signals_lead_is_refused(alone: dict[str, Job]) -> None:
    job = alone["short"]
    assert job.wait() == 2, job.text()
    assert "--time of 10 minutes leaves no time to train" in job.text()


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
