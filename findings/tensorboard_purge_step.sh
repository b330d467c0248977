#!/usr/bin/env bash
# tensorboard 2.21.0: the event that SummaryWriter(purge_step=N) writes after a restart, so that steps which are done again
# stand once, makes EventAccumulator drop every point with a step of N or more of EVERY tag in the directory. A tag whose
# steps count something else, as "lm loss vs samples" of Megatron-LM does (4 samples per step here), loses its valid
# history too. Without the event repeated steps stand twice (seen on Python 3.12, 2026-11-28):
#
#   loss [1, 2, 3, 4, 5, 6, 7, 8], loss vs samples [4, 24, 28, 32]
#
# Exits with 0 while that is so. Installs into a temporary folder; PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorboard==2.21.0 'setuptools<81'
cd "$folder"
"$folder/venv/bin/python" - <<'END'
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


def run(first: int, purge_step: int | None = None) -> None:
    """Steps `first` to 8, as SummaryWriter.add_scalar writes them."""
    writer = EventFileWriter("events")
    if purge_step is not None:
        writer.add_event(Event(step=purge_step, file_version="brain.Event:2"))
        writer.add_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
    for step in range(first, 9):
        for tag, at in (("loss", step), ("loss vs samples", 4 * step)):
            value = Summary(value=[Summary.Value(tag=tag, simple_value=1 / step)])
            writer.add_event(Event(step=at, summary=value, wall_time=time.time()))
    writer.close()


run(1)
time.sleep(1.1)  # The file's name has the second.
run(6, purge_step=6)
events = EventAccumulator("events")
events.Reload()
steps = {tag: [event.step for event in events.Scalars(tag)] for tag in ("loss", "loss vs samples")}
print(", ".join(f"{tag} {at}" for tag, at in steps.items()))
raise SystemExit(steps != {"loss": [1, 2, 3, 4, 5, 6, 7, 8], "loss vs samples": [4, 24, 28, 32]})
END
