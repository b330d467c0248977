"""Exchanges between ranks, played by threads that share a store."""

import socket
import threading
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from megatron_dyt import rendezvous
from megatron_dyt.errors import TrainingFault, UserError
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
    assert isinstance(error, TrainingFault)
    assert str(error).startswith("ranks 2, 3 of 4 did not answer within 0.3 s. ")


def test_a_rank_0_that_sends_nothing_is_not_waited_for_forever(together: Callable[..., list[Any]]) -> None:
    start = time.monotonic()
    _, error = together(0.3, lambda _: None, lambda each: each.receive_verdict())
    assert isinstance(error, TrainingFault)
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


def test_all_hear_of_who_does_not_answer(together: Callable[..., list[Any]]) -> None:
    def part(each: Exchange) -> None:
        each.settle("a", lambda _: "")

    first, second = together(0.3, part, part, world=3)
    assert isinstance(first, TrainingFault)
    assert isinstance(second, TrainingFault)
    assert str(first) == str(second)
    assert "rank 2 of 3 did not answer" in str(first)


def on_four_ranks(
    monkeypatch: pytest.MonkeyPatch, failures: dict[int, Exception], absent: int | None = None
) -> tuple[list[int], list[Exception | None]]:
    """`on_each_node` on two nodes of two ranks, whose checks fail so: who checked, and what each raised."""
    checked: list[int] = []
    raised: list[Exception | None] = [None] * 4
    store = dist.HashStore()
    monkeypatch.setattr(rendezvous, "_connect", lambda *_: store)
    place = threading.local()
    monkeypatch.setattr(rendezvous, "_from_environment", lambda name, _default: place.of[name])
    # Each thread counts its own exchange.
    monkeypatch.setattr(rendezvous, "_exchanges", _NoCount())

    def play(rank: int) -> None:
        place.of = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": rank % 2}

        def check() -> None:
            checked.append(rank)
            if rank in failures:
                raise failures[rank]

        try:
            rendezvous.on_each_node("files", check, 10)
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(4) if rank != absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return sorted(checked), raised


class _NoCount(dict[str, int]):
    def __setitem__(self, key: str, value: int) -> None:
        super().__setitem__(key, 1)

    def get(self, key: str, default: int = 0) -> int:  # type: ignore[override]
        return 0


def test_the_first_rank_of_each_node_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_four_ranks(monkeypatch, {}) == ([0, 2], [None] * 4)


@pytest.mark.parametrize("node", [0, 2])
def test_wrong_input_on_one_node_is_so_for_all(monkeypatch: pytest.MonkeyPatch, node: int) -> None:
    wrong = UserError("no such file")
    _, raised = on_four_ranks(monkeypatch, {node: wrong})
    assert raised[node] is wrong
    others = [error for rank, error in enumerate(raised) if rank != node]
    assert all(type(error) is UserError for error in others)
    expected = f"no such file (on {socket.gethostname()}, rank {node})"
    assert {str(error) for error in others} == {expected}


def test_wrong_input_on_rank_0_is_said_although_not_all_have_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "_GRACE", 0.3)
    _, raised = on_four_ranks(monkeypatch, {0: UserError("no such file")}, absent=3)
    for error in raised[1:3]:
        assert type(error) is UserError
        assert str(error).startswith("no such file (on ")


def test_a_fault_of_one_node_is_no_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    _, raised = on_four_ranks(monkeypatch, {2: OSError("stale file handle")})
    assert type(raised[2]) is OSError
    assert all(type(raised[rank]) is TrainingFault for rank in (0, 1, 3))
    assert str(raised[0]).startswith("OSError: stale file handle (on ")


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
    assert isinstance(error, TrainingFault)
    assert stores[0].num_keys() == 0


def test_one_rank_needs_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(rendezvous, "_connect", lambda *_: pytest.fail("not needed"))
    done = []
    rendezvous.on_each_node("files", lambda: done.append(1), 1)
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
