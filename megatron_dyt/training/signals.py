"""What SIGTERM and Ctrl-C do to a training process and to its checkpoint writer."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any

from megatron_dyt.patching import Replacement, replaced, wrapper


@dataclass
class Received:
    """SIGTERM and SIGINT so far; once the run is ending, further ones are noted only."""

    numbers: list[int] = field(default_factory=list)
    ending: bool = False


@contextlib.contextmanager
def as_exceptions() -> Iterator[Received]:
    """Note SIGTERM and SIGINT, and raise `KeyboardInterrupt` where the process is."""
    received, owner = Received(), os.getpid()

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == owner:  # Data loader workers inherit the handler.
            received.numbers.append(number)
        if not received.ending:
            raise KeyboardInterrupt

    handled = (signal.SIGTERM, signal.SIGINT)
    previous: dict[int, Any] = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def writer_ignores_sigterm() -> Iterator[None]:
    """Within, Megatron's persistent checkpoint writer outlives the SIGTERM that asks for a last checkpoint.

    Slurm signals every process of a step. The ranks note SIGTERM (--exit-signal-handler) and save; a writer
    that it has ended would leave them waiting for their save until the time is up.
    """
    start = Replacement("megatron.training.initialize", "init_persistent_async_worker", ignoring_sigterm)
    with replaced(start):
        yield


@wrapper
def ignoring_sigterm(start: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`start`, whose processes never see SIGTERM; daemons among them are killed when this process ends.

    They inherit a mask that blocks it, through fork, exec and fork server. A SIGTERM for this process that
    comes meanwhile is not lost: another thread takes it, or this one does afterwards.
    """
    resource_tracker.ensure_running()  # Its start would unblock the signal.
    before = multiprocessing.active_children()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        result = start(*args, **kwargs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for process in multiprocessing.active_children():
        if process.daemon and process not in before:
            # Python ends daemons at its exit by SIGTERM, and would wait for one that ignores it.
            process._popen.terminate = process.kill  # type: ignore[attr-defined]
    return result
