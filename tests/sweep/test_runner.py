"""The queue with a made-up training: outcomes, restarts, a kill, limits, the lock."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dyt.atomic import locked
from megatron_dyt.errors import UserError
from megatron_dyt.sweep import runner, sweep
from megatron_dyt.sweep.outcome import Outcome, Site
from megatron_dyt.sweep.runner import Options
from megatron_dyt.sweep.spec import Run, Seed, Sweep
from tests.sweep import made_up

OPTIONS = Options(parallel=2, program=made_up.PROGRAM)


def a_run(seed: int = 1, **flags: str) -> Run:
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    both = Seed(seed, seed)
    return Run({"kind": "-".join(flags) or "plain"}, both, (*words, *both.flags))


def do(output: Path, *runs: Run, options: Options = OPTIONS) -> list[Outcome]:
    results = runner.run_all(output, runs, options, lambda done: None)
    return [results[run] for run in runs]


def starts(output: Path, run: Run) -> list[str]:
    return (runner.directory_of(output, run) / "starts").read_text().splitlines()


def test_outcomes(tmp_path: Path) -> None:
    finished, infinite, nan, crashed, killed = do(
        tmp_path,
        a_run(1, loss="3"),
        a_run(2, loss="1e10"),
        a_run(3, exit="1", say="RuntimeError: found NaN in local forward loss calculation"),
        a_run(4, exit="2", say="megatron_dyt: error: --lr is -1"),
        a_run(5, exit="-9"),
    )
    assert finished == Outcome("finished", 4, 3.01, 3.01, 0.3, 512, finished.seconds)
    assert [each.status for each in (infinite, nan, crashed, killed)] == [
        *("diverged", "diverged", "failed", "failed")
    ]
    assert (nan.step, nan.valid_loss) == (4, 3.03)
    assert crashed.log_tail == ("megatron_dyt: error: --lr is -1", "exit code 2")
    assert killed.log_tail == ("nothing to say", "ended by signal 9")


def test_what_is_done_is_not_done_again_and_failed_runs_are_on_request(tmp_path: Path) -> None:
    runs = a_run(loss="3"), a_run(exit="1")
    first = do(tmp_path, *runs)
    assert do(tmp_path, *runs) == first
    before = [(runner.directory_of(tmp_path, run) / "result.json").stat().st_mtime_ns for run in runs]
    do(tmp_path, *runs, options=dataclasses.replace(OPTIONS, retry=True))
    after = [(runner.directory_of(tmp_path, run) / "result.json").stat().st_mtime_ns for run in runs]
    assert before[0] == after[0]
    assert before[1] < after[1]


def test_a_directory_of_other_flags_is_refused(tmp_path: Path) -> None:
    do(tmp_path, a_run(loss="3"))
    with pytest.raises(UserError, match=r"other flags.*differ in: "):
        do(tmp_path, a_run(loss="4"))


def test_parallel_runs_have_threads_and_a_cache_of_their_own(tmp_path: Path) -> None:
    runs = [a_run(seed, seconds="0.3") for seed in (1, 2)]
    do(tmp_path, *runs, options=dataclasses.replace(OPTIONS, threads=3))
    assert [starts(tmp_path, run)[0] for run in runs] == [f"3 {tmp_path}/cache/{slot}" for slot in (0, 1)]


def test_three_failures_in_a_row_end_the_sweep(tmp_path: Path) -> None:
    runs = [a_run(seed, exit="1", say="the cause") for seed in range(1, 9)]
    with pytest.raises(UserError, match=r"3 runs failed .* 5 were not started.*the cause.*exit code 1"):
        do(tmp_path, *runs, options=dataclasses.replace(OPTIONS, parallel=1))


def test_checkpoints_stay_until_a_run_has_finished(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, save_interval=5, retry=True)
    failed, finished = a_run(1, exit="1"), a_run(2)
    for _ in range(2):
        do(tmp_path, failed, finished, options=options)
    # It was started twice in the same directory; without checkpoints it would have been emptied.
    assert len(starts(tmp_path, failed)) == 2
    saved = [(runner.directory_of(tmp_path, run) / "checkpoint").is_dir() for run in (failed, finished)]
    assert saved == [True, False]


def test_a_run_with_checkpoints_keeps_the_statistics_of_its_dyts(tmp_path: Path) -> None:
    run = a_run(1, stats="0.25")
    for options in (OPTIONS, dataclasses.replace(OPTIONS, save_interval=5)):
        output = tmp_path / str(options.save_interval)
        (result,) = do(output, run, options=options)
        assert result.sites == {"attn": Site(0.25, 0.0)}
        assert (runner.directory_of(output, run) / "dyt_stats.jsonl").is_file()


def test_what_a_run_began_with_other_flags_is_refused(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, save_interval=5)
    do(tmp_path, a_run(loss="3"), options=options)
    # As if it had been killed.
    (runner.directory_of(tmp_path, a_run(loss="3")) / "result.json").unlink()
    with pytest.raises(UserError, match=r"other flags.*differ in: "):
        do(tmp_path, a_run(loss="4"), options=options)
    assert do(tmp_path, a_run(loss="3"), options=options)[0].status == "finished"


def test_gpus_of_a_slot_are_among_those_that_the_sweep_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner._devices(1, 2) == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert runner._devices(1, 2) == "6,7"


def test_a_sweep_takes_no_gpus_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(
        UserError, match=r"2 runs at a time of 2 GPUs each need 4, .*=4,5,6 has 3.*--parallel"
    ):
        do(tmp_path, a_run(), options=dataclasses.replace(OPTIONS, gpus=2))
    assert not (tmp_path / "runs").exists()


SWEEP = """
import sys
from pathlib import Path
from megatron_dyt.sweep import runner
from tests.sweep import made_up, test_runner
runs = test_runner.one_that_waits(Path(sys.argv[1]))
runner.run_all(Path(sys.argv[1]), runs, test_runner.OPTIONS, lambda done: None)
"""


def one_that_waits(output: Path) -> tuple[Run, Run]:
    """A run that ends, and one that does not before there is a file."""
    return a_run(1), a_run(2, wait_for=str(output / "go"))


def test_a_killed_sweep_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", SWEEP, str(tmp_path)])
    done, undone = one_that_waits(tmp_path)
    wait_for(runner.directory_of(tmp_path, done) / "result.json")
    wait_for(runner.directory_of(tmp_path, undone) / "starts")
    before = (runner.directory_of(tmp_path, done) / "result.json").stat().st_mtime_ns
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    until = time.monotonic() + 20
    while processes_with(str(runner.directory_of(tmp_path, undone))) and time.monotonic() < until:
        time.sleep(0.05)
    assert processes_with(str(runner.directory_of(tmp_path, undone))) == []
    assert runner.finished(tmp_path, [done, undone]).keys() == {done}
    (tmp_path / "go").touch()
    assert [each.status for each in do(tmp_path, done, undone)] == ["finished", "finished"]
    assert (runner.directory_of(tmp_path, done) / "result.json").stat().st_mtime_ns == before


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not come"
        time.sleep(0.05)


def processes_with(word: str) -> list[str]:
    """Ids of processes that have `word` among their arguments."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and word.encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
        except OSError:  # It has just ended.
            continue
    return [each for each in found if int(each) != os.getpid()]


def a_sweep(*runs: Run, prepare: tuple[str, ...] = ()) -> Sweep:
    return Sweep("A title", prepare, runs, ("kind",), None)


def test_the_table_is_written_after_each_run(tmp_path: Path) -> None:
    runs = a_run(1, loss="3"), a_run(2, loss="3"), a_run(exit="1")
    paths = sweep.run_sweep(a_sweep(*runs), tmp_path, OPTIONS)
    assert [path.name for path in paths] == ["table.csv", "summary.csv", "comparisons.csv", "table.json"]
    rows = paths[0].read_text().splitlines()
    assert rows[0].startswith("kind,seed_weights,seed_data,status,step,valid_loss")
    assert rows[1].startswith("loss,1,1,finished,4,3.01,3.01,0.3,512,")
    assert [row.split(",")[3] for row in rows[1:]] == ["finished", "finished", "failed"]
    cells = json.loads(paths[-1].read_text())["cells"]
    assert cells[0]["loss"] == {
        "count": 2,
        "mean": pytest.approx(3.015),
        "std": pytest.approx(0.01 / 2**0.5),
        "low": 3.01,
        "high": 3.02,
    }
    assert cells[1]["failed"] == 1


def test_two_sweeps_in_one_directory_are_refused(tmp_path: Path) -> None:
    second = f"another sweep works in {tmp_path}"
    with locked(tmp_path / "lock", ""), pytest.raises(UserError, match=second):
        sweep.run_sweep(a_sweep(a_run()), tmp_path, OPTIONS)


def test_a_failed_command_of_prepare_ends_the_sweep_before_a_run(tmp_path: Path) -> None:
    commands = (f"test -x $PY && touch {tmp_path}/first", "exit 3", f"touch {tmp_path}/third")
    with pytest.raises(UserError, match=r"`exit 3` ended with exit code 3"):
        sweep.run_sweep(a_sweep(a_run(), prepare=commands), tmp_path, OPTIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "lock"]


def test_a_grid_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "LIMIT", 3)
    with pytest.raises(UserError, match=r"4 runs \(2 points with 2 seeds\), more than 3.*--yes"):
        sweep.check_size(a_sweep(*(a_run(seed, **{kind: "1"}) for seed in (1, 2) for kind in "ab")))
