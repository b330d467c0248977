"""Megatron's persistent checkpoint writer outlives the SIGTERM that asks for a last checkpoint.

Slurm signals every process of a step. The ranks note SIGTERM (--exit-signal-handler) and save; a writer that
it has ended would leave them waiting for their save until the time is up.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

from megatron_dyt.patching import Patches, Replacement


@contextlib.contextmanager
def protected() -> Iterator[None]:
    """Within, Megatron starts its writer as `deaf_to_sigterm` does."""
    patches = Patches()
    patches.apply(
        [Replacement("megatron.training.initialize", "init_persistent_async_worker", deaf_to_sigterm)]
    )
    try:
        yield
    finally:
        patches.undo()


def deaf_to_sigterm(start: Callable[..., Any]) -> Callable[..., Any]:
    """`start`, whose processes never see SIGTERM; daemons among them are killed when this process ends.

    They inherit a mask that blocks it, through fork, exec and fork server. A SIGTERM for this process that
    comes meanwhile is not lost: another thread takes it, or this one does afterwards.
    """

    @functools.wraps(start)
    def start_deaf(*args: Any, **kwargs: Any) -> Any:
        resource_tracker.ensure_running()  # Its start would unblock the signal.
        before = multiprocessing.active_children()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            result = start(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for process in multiprocessing.active_children():
            if process.daemon and process not in before:
                # Python ends daemons at its exit by SIGTERM, and would wait for one that does not see it.
                process._popen.terminate = process.kill  # type: ignore[attr-defined]
        return result

    return start_deaf
