"""What a forked checkpoint writer hands back, and that it ends with its rank."""

import os
import queue
import signal
import time
from typing import Any, NamedTuple

import pytest

from megatron_dyt.cpu import checkpointing


def test_results_come_back_from_a_forked_process_in_order_and_at_any_size() -> None:
    results = checkpointing.Results()
    results.put({0: ["here"]})
    child = os.fork()
    if child == 0:
        results.put(b"x" * 3_000_000)
        os._exit(0)
    os.waitpid(child, 0)
    results.put(RuntimeError("disk"))
    assert results.get_nowait() == {0: ["here"]}
    assert results.get_nowait() == b"x" * 3_000_000
    assert str(results.get_nowait()) == "disk"
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_there_is_one_queue() -> None:
    get = checkpointing.results_queue(None)
    assert get() is get(mp_mode="fork")


class Request(NamedTuple):
    async_fn: Any


def test_a_writer_is_killed_with_its_rank() -> None:
    """A process (the rank) forks another one (the writer) and is killed: the writer's pipe closes."""
    reading, writing = os.pipe()
    rank = os.fork()
    if rank == 0:
        os.close(reading)

        def schedule(_caller: Any, request: Request) -> None:
            if os.fork() == 0:
                request.async_fn()
                os._exit(0)

        def write() -> None:
            os.write(writing, b"w")
            time.sleep(60)

        checkpointing.ending_with_its_rank(schedule)(None, Request(write))
        time.sleep(60)
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 1) == b"w"
    start = time.monotonic()
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    assert os.read(reading, 1) == b""
    assert time.monotonic() - start < 20


def test_nothing_to_write_stays_nothing() -> None:
    seen: list[Any] = []
    checkpointing.ending_with_its_rank(lambda _caller, request: seen.append(request))(None, Request(None))
    assert seen == [Request(None)]
