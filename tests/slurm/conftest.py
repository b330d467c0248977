"""A real Slurm cluster of two nodes on this machine, made once for all tests of the folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.examples import fakes
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
# What a rank does that trains to the end, in `fakes.PYTHON`.
ALL_STEPS = 'echo 10 > "$TRACKER"'
# Nothing here takes as long, on a busy machine either.
PATIENCE = 300.0


@dataclass
class Job:
    """A batch job of one of the launch scripts.

    Attributes:
        number: Slurm's.
        log: what the batch script and the ranks print, restarts included.
    """

    cluster: Cluster
    number: str
    log: Path

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def field(self, name: str) -> str:
        """One of what `scontrol show job` says."""
        found = re.search(rf"\b{name}=(\S+)", self.cluster.call("scontrol", "show", "job", self.number))
        assert found, name
        return found[1]

    def wait(self) -> int:
        """The exit code, once the job has ended for good. One that a signal ended is negative."""
        self.until(lambda: self.field("JobState") in ENDED, "the job's end")
        code, signal = map(int, self.field("ExitCode").split(":"))
        return -signal or code

    def wait_for(self, text: str) -> None:
        """Until the log has `text`."""
        self.until(lambda: text in self.text(), f"{text!r} in the log")

    def until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not happened():
            if time.monotonic() > deadline:
                self.cluster.call("scancel", self.number)  # The next test's job is not to wait for it.
                pytest.fail(f"waited for {what}:\n{self.text()[-3000:]}")
            time.sleep(0.1)


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE")


@dataclass
class Cluster:
    """Where its files are, and the environment of a client."""

    directory: Path
    environment: dict[str, str]

    def call(self, *command: str, cwd: Path = ROOT, stdin: str = "", **settings: str) -> str:
        """The output of a command that succeeds."""
        done = subprocess.run(
            command,
            input=stdin,
            **{"cwd": cwd, "env": self.environment | settings, "capture_output": True, "text": True},
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(
        self,
        home: Path,
        *options: str,
        flags: tuple[str, ...] = (),
        cwd: Path = ROOT,
        piped: bool = False,
        **settings: str,
    ) -> Job:
        """Submit 125m.sh with options of sbatch, flags of Megatron and settings of the script.

        `piped`: by standard input, not by its name.
        """
        log = home / "log"
        options = ("--output", str(log), "--time", "60", "--nodes", "1", "--gpus-per-node", "2", *options)
        script = ROOT / "examples/llama/125m.sh"
        named, stdin = ((), script.read_text()) if piped else ((str(script), *flags), "")
        given = {"OUT": str(home / "run"), "MASTER_PORT": str(free_port())} | settings
        answer = self.call("sbatch", "--parsable", *options, *named, cwd=cwd, stdin=stdin, **given)
        return Job(self, answer.strip(), log)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: on Debian, apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons and the nodes' names in /etc/hosts need root")
    directory = tmp_path_factory.mktemp("slurm")
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
    }
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": PATH}
    started = subprocess.run(
        ["bash", str(SCRIPT), "start", str(directory), str(free_port())],
        **{"env": outside | own, "capture_output": True, "text": True, "check": False},
    )
    try:
        if started.returncode != 0:
            pytest.skip(f"no Slurm cluster can be started here: {started.stdout}{started.stderr}")
        yield Cluster(directory, outside | own | {"SLURM_CONF": str(directory / "slurm.conf")})
    finally:
        subprocess.run(["bash", str(SCRIPT), "stop", str(directory)], env=outside | own, check=True)


@pytest.fixture
def faked(tmp_path: Path) -> dict[str, str]:
    return faked_settings(tmp_path)


def faked_settings(home: Path) -> dict[str, str]:
    """Settings of a script whose recipe, plan and training are fakes: ten steps; see `fakes.PYTHON`."""
    (home / "data.idx").touch()
    data = {name: str(home / "data") for name in ("TRAIN_DATA", "VALID_DATA")}
    return fakes.python(home) | data | {"TOKENIZER_MODEL": str(home / "data.idx")}
