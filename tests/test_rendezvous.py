"""Exchanges between ranks, played by threads that share a store."""

from __future__ import annotations

import threading
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from megatron_dyt import rendezvous
from megatron_dyt.errors import UserError
from megatron_dyt.rendezvous import Exchange


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """`together(seconds, *parts)`: a part gets its rank's Exchange; what it returns or raises comes back."""

    def run(seconds: float, *parts: Callable[[Exchange], Any], world: int | None = None) -> list[Any]:
        store = dist.HashStore()
        monkeypatch.setattr(rendezvous, "_connect", lambda *_: store)
        monkeypatch.setattr(rendezvous, "_MARGIN", 0.2)
        monkeypatch.setattr(rendezvous, "_exchanges", {})
        monkeypatch.setenv("WORLD_SIZE", str(world or len(parts)))
        exchanges = []
        for rank in range(len(parts)):
            monkeypatch.setenv("RANK", str(rank))
            rendezvous._exchanges.clear()  # Each rank's own count.
            exchanges.append(Exchange("topic", seconds))
        results: list[Any] = [None] * len(parts)

        def play(rank: int) -> None:
            try:
                results[rank] = parts[rank](exchanges[rank])
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=play, args=(rank,)) for rank in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        return results

    return run


def sends(text: str) -> Callable[[Exchange], None]:
    return lambda each: each.send(text)


def test_rank_0_has_all_texts_and_the_others_its_verdict(together: Callable[..., list[Any]]) -> None:
    def first(each: Exchange) -> dict[int, str]:
        each.send("a")
        texts = each.collect()
        each.send_verdict("done")
        return texts

    def other(each: Exchange) -> str:
        each.send("b")
        return each.receive_verdict()

    assert together(10, first, other, other) == [{0: "a", 1: "b", 2: "b"}, "done", "done"]


def test_who_does_not_answer_is_named(together: Callable[..., list[Any]]) -> None:
    def first(each: Exchange) -> Any:
        each.send("a")
        return each.collect()

    error, _ = together(0.3, first, sends("b"), world=4)
    assert isinstance(error, UserError)
    assert str(error).startswith("ranks 2, 3 of 4 did not answer within 0.3 s. ")


def test_a_rank_0_that_sends_nothing_is_not_waited_for_forever(together: Callable[..., list[Any]]) -> None:
    start = time.monotonic()
    _, error = together(0.3, lambda _: None, lambda each: each.receive_verdict())
    assert isinstance(error, UserError)
    assert str(error).startswith("rank 0 did not answer within 0.5 s")
    assert time.monotonic() - start < 20  # Not for the 30 s of grace.


def test_rank_0_stays_until_a_bad_verdict_was_received(together: Callable[..., list[Any]]) -> None:
    left: list[float] = []

    def first(each: Exchange) -> None:
        each.send_verdict("bad")
        left.append(time.monotonic())

    def late(each: Exchange) -> tuple[str, float]:
        time.sleep(0.5)
        return each.receive_verdict(), time.monotonic()

    _, (verdict, received) = together(10, first, late)
    assert verdict == "bad"
    assert left[0] >= received - 0.05


def test_but_not_longer_than_the_time_out(together: Callable[..., list[Any]]) -> None:
    start = time.monotonic()
    together(0.3, lambda each: each.send_verdict("bad"), lambda _: None)
    assert 0.3 <= time.monotonic() - start < 20


def test_a_check_of_rank_0_counts_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`on_rank_0` in two ranks one after the other: the second finds what the first left."""
    store = dist.HashStore()
    monkeypatch.setattr(rendezvous, "_connect", lambda *_: store)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def check() -> None:
        raise UserError("no such file")

    for rank, run in (("0", check), ("1", lambda: pytest.fail("rank 1 must not check"))):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(rendezvous, "_exchanges", {})
        with pytest.raises(UserError, match="no such file"):
            rendezvous.on_rank_0("files", run, 0.1)


@pytest.mark.parametrize("verdict", ["", "bad"])
def test_after_an_exchange_the_store_is_empty(together: Callable[..., list[Any]], verdict: str) -> None:
    """torchrun --max-restarts starts new processes on the same store: they must receive nothing old."""
    stores: list[Any] = []

    def first(each: Exchange) -> None:
        each.send("a")
        each.collect()
        each.send_verdict(verdict)
        stores.append(each._store)

    def other(each: Exchange) -> str:
        each.send("b")
        return each.receive_verdict()

    assert together(10, first, other, other) == [None, verdict, verdict]
    assert stores[0].num_keys() == 0


def test_who_answered_in_vain_leaves_nothing_either(together: Callable[..., list[Any]]) -> None:
    stores: list[Any] = []

    def first(each: Exchange) -> Any:
        stores.append(each._store)
        each.send("a")
        return each.collect()

    error, _ = together(0.3, first, sends("b"), world=3)
    assert isinstance(error, UserError)
    assert stores[0].num_keys() == 0


def test_one_rank_needs_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(rendezvous, "_connect", lambda *_: pytest.fail("not needed"))
    done = []
    rendezvous.on_rank_0("files", lambda: done.append(1), 1)
    assert done == [1]


def test_the_time_out_is_that_of_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(rendezvous.VARIABLE, raising=False)
    assert rendezvous.time_out(Namespace(distributed_timeout_minutes=3)) == 180
    assert rendezvous.time_out(Namespace()) == 600
    monkeypatch.setenv(rendezvous.VARIABLE, "2.5")
    assert rendezvous.time_out(Namespace()) == 2.5
    for wrong in ("soon", "-1", "nan"):
        monkeypatch.setenv(rendezvous.VARIABLE, wrong)
        with pytest.raises(UserError, match=rendezvous.VARIABLE):
            rendezvous.time_out(Namespace())


def test_an_address_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR or MASTER_PORT is not set"):
        Exchange("topic", 1)


def test_ranks_are_listed_up_to_a_length() -> None:
    assert rendezvous.ranks([3]) == "rank 3"
    assert rendezvous.ranks([3, 5]) == "ranks 3, 5"
    assert rendezvous.ranks(list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"
