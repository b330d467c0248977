"""A checkpoint writer lives on when its whole process group gets SIGTERM, and ends with its rank."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dyt.training import signals

ROOT = Path(__file__).resolve().parents[2]

# A rank that has noted SIGTERM asks its writer for a save. As Megatron's it is a daemon of a fork server,
# beside the server process of a queue. At the end it is still there.
RANK = """
import multiprocessing, signal, sys, time
from pathlib import Path
from megatron_dyt.training.signals import ignoring_sigterm
from tests.training.test_signals import write

def start():
    context = multiprocessing.get_context("forkserver")
    jobs, results = context.Queue(), multiprocessing.get_context("fork").Manager().Queue()
    context.Process(target=write, args=(jobs, results), daemon=True).start()
    return jobs, results

told = []
jobs, results = (ignoring_sigterm(start) if sys.argv[1] == "ignoring" else start)()
jobs.put("up")
print(results.get(), flush=True)
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
print("ready", flush=True)
while not told:
    time.sleep(0.01)
jobs.put("saved")
time.sleep(0.2)
print(results.get(timeout=5), flush=True)
"""


def write(jobs, results):  # type: ignore[no-untyped-def]
    """The writer: hands back what it gets."""
    while True:
        results.put(jobs.get())


@pytest.mark.parametrize(("how", "saves"), [("ignoring", True), ("plain", False)])
def test_the_group_gets_sigterm(how: str, saves: bool) -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, how],
        **{"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert rank.stdout is not None
    assert [rank.stdout.readline(), rank.stdout.readline()] == ["up\n", "ready\n"]
    os.killpg(rank.pid, signal.SIGTERM)
    out, errors = rank.communicate(timeout=300)  # A writer that is left would keep the pipe open.
    assert (out == "saved\n") == saves, errors
    assert (rank.returncode == 0) == saves


SIGNALLED = """
import os, signal
from megatron_dyt.training import signals

seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append("SIGTERM"))
during = signals.ignoring_sigterm(lambda: (os.kill(os.getpid(), signal.SIGTERM), list(seen))[1])()
print(len(os.listdir("/proc/self/task")), during, seen)
"""


def test_a_signal_for_the_rank_itself_is_not_lost() -> None:
    # In a process of one thread: any other may take the signal at once, or after the test has ended.
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SIGNALLED]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert result.stdout == "1 [] ['SIGTERM']\n"


def test_training_starts_megatrons_writer_so() -> None:
    from megatron.training import initialize

    original = initialize.init_persistent_async_worker
    with signals.writer_ignores_sigterm():
        assert initialize.init_persistent_async_worker.__wrapped__ is original
    assert initialize.init_persistent_async_worker is original
