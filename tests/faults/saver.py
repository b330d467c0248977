"""Trains in forked processes that are killed while they save; each goes on from what the last one left.

    python tests/faults/saver.py JOB.json

JOB.json is {"directory": ..., "argv": [...], "kills": N, "seed": S}. Megatron is imported once. A forked
process tells through a pipe when a save begins, and is sent SIGKILL a random time later. DIRECTORY/kills.json
gets what was seen: for each kill what the process had computed, and what it left.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dyt import pretrain
from megatron_dyt.errors import describe
from megatron_dyt.patching import Patches, Replacement
from megatron_dyt.runtime import checkpoint_crc, checkpoint_dir, cpu

TRAINING = "megatron.training.training"
# A process that neither saves nor ends is a failure.
PATIENCE = 240.0


def main(job_file: str) -> None:
    """Kill as many processes as the job says, and one more that shows that the last one can be resumed."""
    warnings.filterwarnings("ignore")
    cpu.enable()
    import megatron.training.training  # noqa: F401  Here, once, and not in every process.

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    directory = Path(job["directory"])
    chance = random.Random(job["seed"])
    seen = []
    for _ in range(job["kills"] + 1):
        # The first save may be slower; a kill at up to twice a usual one's time hits the steps after it too.
        seen.append(one_life(job["argv"], directory, chance.randint(1, 3), chance.random()))
    Path(directory, "kills.json").write_text(json.dumps(seen), encoding="utf-8")


def one_life(argv: list[str], directory: Path, saves: int, moment: float) -> dict[str, Any]:
    """Start a process, kill it at `moment` of its `saves`-th save; returns what it did and left.

    `moment` is in units of twice the time that the save before took, or of 0.2 seconds for the first.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        train(argv, directory, writing)  # Does not return.
    os.close(writing)
    lines = []
    with os.fdopen(reading) as pipe:
        begun = 0
        length = 0.1
        deadline = time.monotonic() + PATIENCE
        for line in pipe:
            event = json.loads(line)
            lines.append(event)
            begun += event["event"] == "save"
            if event["event"] == "saved":
                length = event["seconds"]
            if begun == saves or time.monotonic() > deadline:
                time.sleep(2 * length * moment)
                break
        os.kill(child, signal.SIGKILL)
        # What it still wrote before it died.
        lines += [json.loads(line) for line in pipe if line.endswith("\n")]
    _, status = os.waitpid(child, 0)
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "events": lines,
        "left": left(directory / "checkpoint"),
    }


def left(save: Path) -> dict[str, Any]:
    """What is on disk: the tracker, the checkpoints, and what is wrong with the one it names."""
    tracker = save / "latest_checkpointed_iteration.txt"
    named = tracker.read_text(encoding="utf-8") if tracker.exists() else None
    problem = None
    if named:
        path = checkpoint_dir.iteration_directory(save, named)
        try:
            checkpoint_dir.check_files(path)
            problem = checkpoint_crc.find_damage(path, lambda _name: True)
        except ValueError as error:
            problem = describe(error)
    begun = [int(path.name[5:]) for path in save.glob("iter_*")]
    return {"tracker": named, "problem": problem, "newest": max(begun, default=0)}


def train(argv: list[str], directory: Path, pipe: int) -> None:
    """In the forked process: train, telling each step and each save."""
    try:
        log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["pretrain"]

        def tell(**event: Any) -> None:
            os.write(pipe, (json.dumps(event) + "\n").encode())

        Patches().apply(observers(tell))
        pretrain.main(["--device", "cpu", *argv])
        tell(event="end")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def observers(tell: Callable[..., None]) -> list[Replacement]:
    """Replacements in Megatron's loop that tell what happens."""

    def around_step(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            from megatron.training import get_args

            result = train_step(*args, **options)
            loss = float(result[0]["lm loss"]).hex()
            tell(event="step", iteration=get_args().curr_iteration + 1, loss=loss)
            return result

        return step

    def around_save(save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def save(iteration: int, *args: Any, **options: Any) -> Any:
            tell(event="save", iteration=iteration)
            start = time.monotonic()
            result = save_checkpoint(iteration, *args, **options)
            tell(event="saved", iteration=iteration, seconds=time.monotonic() - start)
            return result

        return save

    return [
        Replacement(TRAINING, "train_step", around_step),
        Replacement(TRAINING, "save_checkpoint", around_save),
    ]


if __name__ == "__main__":
    main(sys.argv[1])
