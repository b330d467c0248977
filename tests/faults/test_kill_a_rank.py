"""SIGKILL of one rank of two: the launch ends, and the run goes on bit for bit as if nothing had been."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dyt.checkpoints import crc
from tests.ranks import Parent, Rank

# After the checkpoint that the run is resumed from.
STEPS = 20
TIMEOUT = float(os.environ.get("MEGATRON_DYT_TEST_TIMEOUT", "600"))

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def arguments(tiny_llama: list[str], directory: Path, exit_at: int) -> list[str]:
    """Training on two ranks, with tensor and sequence parallelism, that saves every 10 steps."""
    argv = [*tiny_llama, "--normalization", "DyT", "--dyt-preset", "unit", "--attention-dropout", "0.1"]
    argv += ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--train-iters", "4000"]
    argv += ["--save", str(directory), "--load", str(directory), "--save-interval", "10"]
    argv += ["--exit-interval", str(exit_at), "--distributed-timeout-minutes", "2"]
    return ["-m", "megatron_dyt.pretrain", "--device", "cpu", *argv]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(ranks: Parent, argv: list[str], log: Path) -> str:
    assert ranks.run([Rank(argv, str(log))] * 2, watched=True) == [0, 0], log.read_text()[-3000:]
    return log.read_text()


def rank_processes(launcher: int) -> dict[int, int]:
    """The process of each rank that torchrun has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [int(each[5:]) for each in environment if each.startswith(b"RANK=")]
        if parent == launcher and ranks:
            found[ranks[0]] = int(path.name)
    return found


def kill_a_rank_after(step: int, rank: int, argv: list[str], log: Path) -> str:
    """Run until `step` was logged, SIGKILL `rank`, and wait for the end, which must come by itself."""
    with log.open("w") as output:
        launcher = subprocess.Popen(argv, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + TIMEOUT
            while not re.search(rf"iteration +{step}/", log.read_text()):
                assert launcher.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.02)
            os.kill(rank_processes(launcher.pid)[rank], signal.SIGKILL)
            assert launcher.wait(60) != 0
        finally:
            launcher.terminate()
            launcher.wait(60)
    return log.read_text()


def contents(checkpoint: Path) -> dict[str, bytes]:
    """Every stored tensor and object, in bytes."""
    found = {}
    for item in crc.stored_items(checkpoint):
        data = item.file.read_bytes()[item.offset : item.offset + item.length]
        found[f"{item.name} {item.file.name} {len(found)}"] = data
    return found


def test_a_killed_rank_ends_the_launch_and_the_run_goes_on_bit_for_bit(
    tiny_llama: list[str], tmp_path: Path, ranks: Parent
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rank = random.Random(5).randrange(2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*torchrun, *arguments(tiny_llama, killed, 4000)]
    log = kill_a_rank_after(13, rank, argv, tmp_path / "log")
    assert re.search(r"exitcode *: -9.*\n.*|Signal 9 \(SIGKILL\) received", log)
    saved = int((killed / "latest_checkpointed_iteration.txt").read_text())
    assert saved >= 10
    end = saved + STEPS
    resumed = run(ranks, arguments(tiny_llama, killed, end), tmp_path / "resumed")
    in_one_go = run(ranks, arguments(tiny_llama, whole, end), tmp_path / "in_one_go")
    rest, again = losses(in_one_go)[saved:], losses(resumed)
    assert len(again) == STEPS
    # The second line of a process is the mean of its first two steps.
    assert [again[0], *again[2:]] == [rest[0], *rest[2:]]
    final = f"iter_{end:07d}"
    first, second = contents(whole / final), contents(killed / final)
    assert first.keys() == second.keys()
    differing = [name for name, data in first.items() if data != second[name]]
    # The arguments name the directory.
    assert [name for name in differing if not name.startswith("common_state")] == []


def losses(log: str) -> list[str]:
    return re.findall(r"lm loss: (\S+)", log)
