"""What has become of the shards of a run, as a progress line and as results."""

from __future__ import annotations

import time
from collections.abc import Sequence

from megatron_dyt.data.collection import Manifest
from megatron_dyt.data.progress import Progress, duration
from megatron_dyt.data.settings import Shard
from megatron_dyt.data.workers import Broken, Event, Finished, Progressed


class Tracker:
    """Listens to `workers.run`.

    Args:
        shards: those that are being written.
        progress: the line, whose total is the size of their sources, 0 where that is unknown.
        skip_broken: whether to go on after a shard that cannot be read.
    """

    def __init__(self, shards: Sequence[Shard], progress: Progress, skip_broken: bool) -> None:
        self.shards, self.progress, self.skip_broken = shards, progress, skip_broken
        self.manifests: dict[int, Manifest] = {}
        # Problems by the shard's name.
        self.broken: dict[str, str] = {}
        self.started = time.monotonic()
        self.now: dict[int, Progressed] = {}

    def __call__(self, event: Event) -> bool:
        match event:
            case Progressed():
                self.now[event.number] = event
            case Finished(number, manifest):
                self.manifests[number] = manifest
                size = self.shards[number].size
                self.now[number] = Progressed(number, size, manifest["text_bytes"], manifest["tokens"])
            case Broken(number, problem):
                self.now.pop(number, None)
                self.broken[self.shards[number].prefix.name] = problem
                self.progress.say(f"broken: {problem}")
        self._show()
        return self.skip_broken or not self.broken

    def _show(self) -> None:
        text_bytes = sum(each.text_bytes for each in self.now.values())
        rate = text_bytes / 1e6 / max(time.monotonic() - self.started, 1e-9)
        notes = [f"{sum(each.tokens for each in self.now.values()) / 1e6:.1f}M tokens"]
        if self.progress.total:
            # The line's own rate is of the files as they are, most often compressed.
            notes.insert(0, f"{rate:.1f} MB/s of text")
        if len(self.shards) > 1:
            notes.append(f"{len(self.manifests)} of {len(self.shards)} shards done")
        if not self.progress.total and self.manifests and text_bytes:
            # Text of all shards, if those that are not done are like the others.
            written = sum(self.now[number].text_bytes for number in self.manifests)
            missing = written / len(self.manifests) * (len(self.shards) - len(self.broken)) - text_bytes
            notes.append(f"about {duration(max(missing, 0) / 1e6 / rate)} left")
        done = sum(each.read for each in self.now.values()) if self.progress.total else text_bytes
        self.progress.update(done, ", ".join(notes))
