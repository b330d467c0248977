"""Shards over worker processes: each reads, encodes and writes its own, and sends counts alone.

A worker that finds nobody at the other end of its pipe, because this process was killed, clears up what it
has begun and ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from megatron_dyt.data import shard as shard_module
from megatron_dyt.data.settings import Settings, Shard
from megatron_dyt.data.shard import Counts
from megatron_dyt.data.sources import BrokenSourceError
from megatron_dyt.data.tokenizers import Encoder

REPORT_SECONDS = 0.2
# A worker that is told to stop does so after a batch of text.
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class Progressed:
    """How far a shard is: bytes read of its sources, bytes of text and tokens so far."""

    number: int
    read: int
    text_bytes: int
    tokens: int


@dataclass(frozen=True)
class Finished:
    """A shard is complete."""

    number: int
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Broken:
    """A shard cannot be read, and nothing of it was kept."""

    number: int
    problem: str


Event = Progressed | Finished | Broken
# Told of every event; whether another shard may be begun.
Listener = Callable[[Event], bool]


def run(shards: Sequence[Shard], settings: Settings, workers: int, listener: Listener) -> None:
    """Write all shards.

    `listener` is told what becomes of each, by its number. When it says False, shards that have been begun
    are completed and no other is; what it raises stops the work at once.

    Raises:
        RuntimeError: a worker was killed.
        Exception: what a worker could not go on from, such as a full disk; finished shards stay.
    """
    if min(workers, len(shards)) <= 1:
        encode = settings.tokenizer.encoder()
        for number, shard in enumerate(shards):
            if not listener(_write(number, shard, settings, encode, listener)):
                break
    else:
        _Crew(shards, settings, listener).run(workers)


def _write(
    number: int, shard: Shard, settings: Settings, encode: Encoder, tell: Callable[[Progressed], object]
) -> Finished | Broken:
    """Write one shard, with reports now and then."""
    last = time.monotonic()

    def report(read: int, counts: Counts) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            tell(Progressed(number, read, counts.text_bytes, counts.tokens))

    try:
        return Finished(number, shard_module.write(shard, settings, encode, report))
    except BrokenSourceError as error:
        return Broken(number, str(error))


class _Crew:
    """The worker processes, and which shard each has."""

    def __init__(self, shards: Sequence[Shard], settings: Settings, listener: Listener) -> None:
        self.shards, self.settings, self.listener = shards, settings, listener
        self.next = 0
        self.members: dict[Connection, BaseProcess] = {}
        self.busy_with: dict[Connection, int] = {}

    def run(self, workers: int) -> None:
        try:
            for _ in range(min(workers, len(self.shards))):
                self._hire()
            while self.busy_with:
                for connection in wait(list(self.busy_with)):
                    assert isinstance(connection, Connection)
                    self._hear(connection)
        finally:
            self._dismiss()

    def _hire(self) -> None:
        # Not fork: it would copy the locks of threads that pyarrow and others have started.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.settings), daemon=True)
        process.start()
        theirs.close()
        self.members[ours] = process
        self._give(ours)

    def _give(self, connection: Connection) -> None:
        """Give a worker the next shard, if there is one."""
        self.busy_with.pop(connection, None)
        if self.next < len(self.shards):
            self.busy_with[connection] = self.next
            with contextlib.suppress(BrokenPipeError):  # A dead worker is heard of in `_hear`.
                connection.send((self.next, self.shards[self.next]))
            self.next += 1

    def _hear(self, connection: Connection) -> None:
        try:
            message = connection.recv()
        except (EOFError, ConnectionResetError):
            self._bury(connection)
        if isinstance(message, BaseException):
            raise message
        more = self.listener(message)
        if not isinstance(message, Progressed):
            if not more:
                self.next = len(self.shards)
            self._give(connection)

    def _bury(self, connection: Connection) -> NoReturn:
        process = self.members[connection]
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory? --workers of a smaller number needs less)" if code == -signal.SIGKILL else ""
        prefix = self.shards[self.busy_with[connection]].prefix
        raise RuntimeError(
            f"the worker that wrote {prefix} {how}{hint}; started again, the same command goes on from the "
            "finished shards"
        )

    def _dismiss(self) -> None:
        """A closed pipe tells a worker to stop: it has nobody to report to."""
        for connection in self.members:
            connection.close()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.members.values():
            process.join(max(deadline - time.monotonic(), 0))
            if process.is_alive():
                process.terminate()


def _work(connection: Connection, settings: Settings) -> None:
    """A worker's life: shards come by the pipe, events and what it cannot go on from go back."""
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
