"""Trains in forked processes that are killed while they save; each goes on from what the last one left.

    python tests/faults/saver.py JOB.json

JOB.json is {"directory": ..., "argv": [...], "kills": N, "seed": S}. Megatron is imported once. A forked
process tells through a pipe when a save begins, and is sent SIGKILL a random time later, until N kills were
in the middle of a save. DIRECTORY/kills.json gets what was seen: for each kill what the process had
computed, and what it left.
"""

import importlib
import itertools
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

from megatron_dyt import cpu, pretrain
from megatron_dyt.checkpoints import crc, iterations
from megatron_dyt.errors import describe
from megatron_dyt.patching import Patches, Replacement, wrapper

TRAINING = "megatron.training.training"
# A process that neither saves nor ends is a failure.
PATIENCE = 240.0
# So is a job of which most kills miss.
LIVES_A_KILL = 4


def main(job_file: str) -> None:
    """Kill processes until enough died in a save, and one more, which shows that the last can be resumed."""
    warnings.filterwarnings("ignore")
    cpu.enable()  # Here, once, and not in each process: it imports Megatron.
    importlib.import_module(TRAINING)
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    directory = Path(job["directory"])
    chance = random.Random(job["seed"])
    seen: list[dict[str, Any]] = []
    period, hits = 0.2, 0
    while hits < job["kills"] and len(seen) < LIVES_A_KILL * job["kills"]:
        life = one_life(job["argv"], directory, chance.randint(1, 3), period * chance.random())
        seen.append(life)
        hits += life["left"]["in_a_save"]
        begun = [event["time"] for event in life["events"] if event["event"] == "save"]
        # From one save to the next, as this machine is now; the first one of a process may be slower.
        period = min([b - a for a, b in itertools.pairwise(begun)], default=period)
    seen.append(one_life(job["argv"], directory, 1, 0.0))
    Path(directory, "kills.json").write_text(json.dumps(seen), encoding="utf-8")


def one_life(argv: list[str], directory: Path, saves: int, delay: float) -> dict[str, Any]:
    """Start a process, kill it `delay` seconds into its `saves`-th save; returns what it did and left."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        train(argv, directory, writing)  # Does not return.
    os.close(writing)
    lines = []
    with os.fdopen(reading) as pipe:
        begun = 0
        deadline = time.monotonic() + PATIENCE
        for line in pipe:
            event = json.loads(line)
            lines.append(event)
            begun += event["event"] == "save"
            if begun == saves or time.monotonic() > deadline:
                time.sleep(delay)
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
    """What is on disk: the checkpoint to go on from, what is wrong with it, whether a save was cut off."""
    tracker = save / "latest_checkpointed_iteration.txt"
    named = tracker.read_text(encoding="utf-8") if tracker.exists() else ""
    begun = sorted((int(path.name[5:]) for path in save.glob("iter_*")), reverse=True)
    # A kill between Megatron's emptying of the tracker and its writing leaves it empty.
    last = int(named) if named else next((each for each in begun if problem_of(save, each) is None), 0)
    return {
        "last": last,
        "problem": problem_of(save, last) if last else None,
        "in_a_save": not named or max(begun) > last,
    }


def problem_of(save: Path, iteration: int) -> str | None:
    """What is wrong with a checkpoint; None when it is whole."""
    path = iterations.iteration_directory(save, str(iteration))
    if not (path / "metadata.json").is_file():
        return "not finished"
    try:
        iterations.check_files(path)
        return crc.find_damage(path, lambda _name: True)
    except ValueError as error:
        return describe(error)


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

    @wrapper
    def around_step(train_step: Callable[..., Any], *args: Any, **options: Any) -> Any:
        from megatron.training import get_args

        result = train_step(*args, **options)
        loss = float(result[0]["lm loss"]).hex()
        tell(event="step", iteration=get_args().curr_iteration + 1, loss=loss)
        return result

    @wrapper
    def around_save(save: Callable[..., Any], iteration: int, *args: Any, **options: Any) -> Any:
        tell(event="save", iteration=iteration, time=time.monotonic())
        return save(iteration, *args, **options)

    return [
        Replacement(TRAINING, "train_step", around_step),
        Replacement(TRAINING, "save_checkpoint", around_save),
    ]


if __name__ == "__main__":
    main(sys.argv[1])
