"""Datasets over worker processes: each reads, encodes and writes its own, and sends counts alone.

A worker that finds nobody at the other end of its pipe, because the first process was killed, removes what it
has begun and ends. Why this is not datatrove's local executor: docs/data.md.
"""

import contextlib
import logging
import multiprocessing
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NoReturn

from megatron_dyt.data import shard as shard_module
from megatron_dyt.data.dataset_manifest import Counts
from megatron_dyt.data.shard import Settings, Shard
from megatron_dyt.data.sources import BrokenSourceError
from megatron_dyt.data.tokenizers import Encoder
from megatron_dyt.log import progress_bar

_log = logging.getLogger(__name__)

# How often a worker says how far it is.
REPORT_SECONDS = 0.2
# A worker that is told to stop does so after a batch of text.
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Progressed:
    """How far a dataset is: bytes read of its sources, bytes of text and tokens so far."""

    number: int
    read: int
    text_bytes: int
    tokens: int


@dataclass(frozen=True)
class Finished:
    """A dataset is complete, with so many bytes of text and tokens."""

    number: int
    text_bytes: int
    tokens: int


@dataclass(frozen=True)
class Broken:
    """The sources of a dataset cannot be read, and nothing of it was kept."""

    number: int
    problem: str


Event = Progressed | Finished | Broken


def write_all(
    shards: Sequence[Shard], settings: Settings, processes: int, skip_broken: bool, what: str
) -> dict[str, str]:
    """Write the datasets, with a line of progress about `what`.

    When one is broken, those that have been begun are completed and, unless `skip_broken`, no other is begun.

    Returns:
        What is wrong with the broken ones, by their names.

    Raises:
        RuntimeError: a worker was killed.
        Exception: what a worker could not go on from, such as a full disk; finished datasets stay.
    """
    with contextlib.closing(Tracker(shards, skip_broken, what)) as tracker:
        if min(processes, len(shards)) > 1:
            _Pool(shards, settings, tracker.note).run(processes)
        else:
            encode = settings.tokenizer.encoder()
            for number, shard in enumerate(shards):
                if not tracker.note(_write(number, shard, settings, encode, tracker.note)):
                    break
    return tracker.broken


def _write(
    number: int, shard: Shard, settings: Settings, encode: Encoder, send: Callable[[Progressed], object]
) -> Finished | Broken:
    """Write one dataset, with reports now and then."""
    last = time.monotonic()

    def report(read: int, counts: Counts) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            send(Progressed(number, read, counts.text_bytes, counts.tokens))

    try:
        manifest = shard_module.write(shard, settings, encode, report)
    except BrokenSourceError as error:
        return Broken(number, str(error))
    return Finished(number, manifest.text_bytes, manifest.tokens)


class Tracker:
    """What has become of the datasets: a line of progress, and the broken ones.

    Attributes:
        broken: what is wrong with the sources of broken datasets, by the dataset's name.
    """

    def __init__(self, shards: Sequence[Shard], skip_broken: bool, what: str) -> None:
        self.shards, self.skip_broken = shards, skip_broken
        self.broken: dict[str, str] = {}
        self.done = 0
        self.started = time.monotonic()
        # The last word of each dataset, by its number.
        self.last: dict[int, Progressed] = {}
        self.bytes = sum(shard.size for shard in shards)
        # A data set on the Hub does not say how many bytes there are to read.
        unit = "B" if self.bytes else " shards"
        self.bar = progress_bar(what, self.bytes or len(shards), unit)

    def note(self, event: Event) -> bool:
        """Take an event in; whether another dataset may be begun."""
        match event:
            case Progressed():
                self.last[event.number] = event
            case Finished(number, text_bytes, tokens):
                self.done += 1
                self.last[number] = Progressed(number, self.shards[number].size, text_bytes, tokens)
            case Broken(number, problem):
                self.last.pop(number, None)
                self.broken[self.shards[number].name] = problem
                self.bar.clear()
                _log.warning("broken: %s", problem)
        read = sum(each.read for each in self.last.values()) if self.bytes else self.done
        self.bar.set_postfix_str(self._totals(), refresh=False)
        self.bar.update(read - self.bar.n)
        return self.skip_broken or not self.broken

    def _totals(self) -> str:
        text_bytes = sum(each.text_bytes for each in self.last.values())
        tokens = sum(each.tokens for each in self.last.values())
        # The bar's own rate is of the files as they are, most often compressed.
        rate = text_bytes / 1e6 / max(time.monotonic() - self.started, 1e-9)
        return f"{rate:.1f} MB/s of text, {tokens / 1e6:.1f}M tokens, {self.done} of {len(self.shards)} done"

    def close(self) -> None:
        """End the line of progress."""
        self.bar.close()


class _Pool:
    """The worker processes, and which dataset each has."""

    def __init__(self, shards: Sequence[Shard], settings: Settings, note: Callable[[Event], bool]) -> None:
        self.shards, self.settings, self.note = shards, settings, note
        self.next = 0
        self.workers: dict[Connection, BaseProcess] = {}
        self.assigned: dict[Connection, int] = {}

    def run(self, processes: int) -> None:
        try:
            for _ in range(min(processes, len(self.shards))):
                self._start_worker()
            while self.assigned:
                for connection in wait(list(self.assigned)):
                    assert isinstance(connection, Connection)
                    self._receive(connection)
        finally:
            self._stop()

    def _start_worker(self) -> None:
        # Not fork: it would copy the locks of threads that pyarrow and others have started.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.settings), daemon=True)
        process.start()
        theirs.close()
        self.workers[ours] = process
        self._assign(ours)

    def _assign(self, connection: Connection) -> None:
        """Give a worker the next dataset, if there is one."""
        self.assigned.pop(connection, None)
        if self.next < len(self.shards):
            self.assigned[connection] = self.next
            with contextlib.suppress(BrokenPipeError):  # `_receive` will find the worker dead.
                connection.send((self.next, self.shards[self.next]))
            self.next += 1

    def _receive(self, connection: Connection) -> None:
        try:
            message = connection.recv()
        except (EOFError, ConnectionResetError):
            self._raise_death(connection)
        if isinstance(message, BaseException):
            raise message
        may_go_on = self.note(message)
        if not isinstance(message, Progressed):
            if not may_go_on:
                self.next = len(self.shards)
            self._assign(connection)

    def _raise_death(self, connection: Connection) -> NoReturn:
        process = self.workers[connection]
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory? --workers of a smaller number needs less)" if code == -signal.SIGKILL else ""
        prefix = self.shards[self.assigned[connection]].prefix
        raise RuntimeError(
            f"the worker that wrote {prefix} {how}{hint}; started again, the same command goes on from the "
            "finished shards"
        )

    def _stop(self) -> None:
        """Close the pipes, which tells the workers to stop, and reap them."""
        for connection in self.workers:
            connection.close()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.workers.values():
            process.join(max(deadline - time.monotonic(), 0))
            if process.is_alive():
                process.terminate()


def _work(connection: Connection, settings: Settings) -> None:
    """A worker: datasets come by the pipe, events and what it cannot go on from go back."""
    # Ctrl-C reaches all processes of a terminal; the first one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            encode = settings.tokenizer.encoder()
            while True:
                number, shard = connection.recv()
                connection.send(_write(number, shard, settings, encode, connection.send))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except BaseException as error:
            connection.send(_sendable(error))


def _sendable(error: BaseException) -> BaseException:
    """The error with its traceback as a note, or its text where it cannot be pickled."""
    error.add_note("in a worker:\n" + traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
        return error
    # Whatever a class of errors does when it is pickled.
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
