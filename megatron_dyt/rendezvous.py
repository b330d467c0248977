"""Texts that ranks exchange before they have a process group, through the key-value store of PyTorch.

A collective hangs when a rank does not take part. A store answers: who has not written its key within the
time-out is known by number. The store is the one that `init_process_group` will use (torchrun's, or rank
0's own at MASTER_ADDR:MASTER_PORT), so nothing else has to be configured.
"""

import os
import socket
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_dyt.errors import TrainingFault, UserError, some

# Seconds; instead of --distributed-timeout-minutes.
VARIABLE = "MEGATRON_DYT_RANK_TIMEOUT"
# Seconds that a rank which has failed stays for the others to receive its reason.
_GRACE = 30.0
# Seconds that the others wait longer than rank 0, from which they receive who is missing.
_MARGIN = 30.0
# A verdict that begins so is no mistake of the user's.
FAULT = "fault: "

# Kept until the process ends: with it rank 0's server would go, which init_process_group takes over.
_store: dist.Store | None = None
_exchanges: dict[str, int] = {}


class Exchange:
    """One exchange of texts between all ranks, about one topic.

    Attributes:
        rank, world: this rank and how many there are; a world of one has nothing to exchange.
        seconds: how long the others are waited for.
    """

    def __init__(self, topic: str, seconds: float) -> None:
        """Raises TrainingFault when the store at MASTER_ADDR:MASTER_PORT cannot be reached in time."""
        self.seconds = seconds
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        else:
            self.rank, self.world = _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)
        # The same on all ranks, which make the same exchanges in the same order.
        _exchanges[topic] = _exchanges.get(topic, 0) + 1
        self._prefix = f"megatron_dyt/{topic}/{_exchanges[topic]}"
        self._verdict_keys = [f"{self._prefix}/verdict", f"{self._prefix}/received"]
        if self.world > 1:
            self._store = _connect(self.rank, seconds)

    def settle(self, text: str, judge: Callable[[dict[int, str]], str], reason: str = "") -> None:
        """Send this rank's text; fail on every rank unless rank 0's `judge`, given all texts, returns "".

        `reason` is why rank 0 fails anyway: what the others receive where not all have answered.

        Raises:
            UserError: what it returned.
            TrainingFault: likewise, where that begins with `FAULT`; or a rank did not answer in time, most
                likely by a fault of its machine, after which a run is started again.
        """
        self.send(text)
        if self.rank > 0:
            verdict = self.receive_verdict()
        else:
            try:
                verdict = judge(self.collect())
            except TrainingFault as fault:
                verdict = reason or f"{FAULT}{fault}"
            self.send_verdict(verdict)
        if verdict.startswith(FAULT):
            raise TrainingFault(verdict.removeprefix(FAULT))
        if verdict:
            raise UserError(verdict)

    def send(self, text: str) -> None:
        """Put this rank's text into the store."""
        self._store.set(f"{self._prefix}/{self.rank}", text)

    def collect(self) -> dict[int, str]:
        """The texts of all ranks. Raises TrainingFault naming those that did not write in time."""
        keys = [f"{self._prefix}/{rank}" for rank in range(self.world)]
        try:
            self._store.wait(keys, timedelta(seconds=self.seconds))
        except RuntimeError as error:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            self._delete(keys)
            if not missing:
                raise
            raise TrainingFault(
                f"{ranks(missing)} of {self.world} did not answer within {self.seconds:g} s. Such a rank "
                "runs without megatron_dyt, with another script or --normalization, or has ended: look at "
                "the end of its log."
            ) from error
        texts = {rank: self._store.get(key).decode() for rank, key in enumerate(keys)}
        self._delete(keys)
        return texts

    def send_verdict(self, verdict: str) -> None:
        """On rank 0: give the verdict; if it is not empty, stay until the others have received it."""
        self._store.set(f"{self._prefix}/verdict", verdict)
        deadline = time.monotonic() + min(_GRACE, self.seconds)
        while verdict and self._received(0) < self.world - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        if verdict and self._received(0) >= self.world - 1:
            self._delete(self._verdict_keys)  # Otherwise who is late still needs it.

    def receive_verdict(self) -> str:
        """On the other ranks: rank 0's verdict. Raises TrainingFault when there is none in time."""
        try:
            self._store.wait([f"{self._prefix}/verdict"], timedelta(seconds=self.seconds + _MARGIN))
            verdict = self._store.get(f"{self._prefix}/verdict").decode()
            if self._received(1) == self.world - 1 and not verdict:
                self._delete(self._verdict_keys)
        except RuntimeError as error:
            raise TrainingFault(
                f"rank 0 did not answer within {self.seconds + _MARGIN:g} s, or has ended. It may run "
                "without megatron_dyt, with another script or --normalization: look at the end of its log."
            ) from error
        return verdict

    def leave(self, reason: str) -> None:
        """On any rank: stop taking part, for a reason that the others receive."""
        if self.rank == 0:
            self.send_verdict(f"rank 0: {reason}")
        else:
            self.send(reason)
            self._received(1)

    def _delete(self, keys: list[str]) -> None:
        """Delete what was sent, once it was received: after a restart of the ranks torchrun gives them the
        same store, and its count of restarts is not the same on all nodes, so cannot tell old from new."""
        for key in keys:
            self._store.delete_key(key)

    def _received(self, count: int) -> int:
        return int(self._store.add(f"{self._prefix}/received", count))


def on_each_node(topic: str, check: Callable[[], None], seconds: float) -> None:
    """Run `check` on the first rank of each node; all ranks fail when it does on one.

    A file may be missing on one node. What `check` raises is raised there; on the other ranks it is a
    `UserError` if it is one there, else a `TrainingFault`.
    """
    exchange = Exchange(topic, seconds)
    failure: Exception | None = None
    # Without LOCAL_RANK nobody knows where a node begins.
    if exchange.rank == 0 or _from_environment("LOCAL_RANK", 1) == 0:
        try:
            check()
        except Exception as error:
            failure = error
            # It fails anyway: no reason to wait for the others as long as for a start.
            exchange.seconds = min(exchange.seconds, _GRACE)
    try:
        if exchange.world > 1:
            text = _as_text(exchange.rank, failure)
            exchange.settle(text, _first_failure, reason=text)
    finally:
        if failure is not None:
            raise failure


def _as_text(rank: int, failure: Exception | None) -> str:
    if failure is None:
        return ""
    kind = "" if isinstance(failure, UserError) else f"{FAULT}{type(failure).__name__}: "
    return f"{kind}{failure} (on {socket.gethostname()}, rank {rank})"


def _first_failure(texts: dict[int, str]) -> str:
    return next(filter(None, texts.values()), "")


def time_out(args: Namespace) -> float:
    """How many seconds a rank waits for the others: as long as for them in `init_process_group`."""
    given = os.environ.get(VARIABLE)
    if given is None:
        return 60.0 * (getattr(args, "distributed_timeout_minutes", None) or 10)
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"{VARIABLE} is {given!r}; give a number of seconds > 0")
    return seconds


def ranks(numbers: list[int]) -> str:
    """ "rank 3" or "ranks 3, 5 and 12 more"."""
    return f"rank{'s' if len(numbers) > 1 else ''} {some([str(number) for number in numbers], 8)}"


def _connect(rank: int, seconds: float) -> dist.Store:
    global _store
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if _store is None:
        host, port = os.environ.get("MASTER_ADDR"), _from_environment("MASTER_PORT", 0)
        if not host or not port:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but MASTER_ADDR or MASTER_PORT is not set. "
                "Start the ranks with torchrun, or give every rank the address of rank 0"
            )
        by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            _store = dist.TCPStore(
                host,
                port,
                is_master=rank == 0 and not by_torchrun,
                timeout=timedelta(seconds=seconds),
                wait_for_workers=False,
                multi_tenant=True,
                use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
            )
        except RuntimeError as error:
            raise TrainingFault(
                f"rank {rank} found no rank 0 at MASTER_ADDR:MASTER_PORT = {host}:{port} in {seconds:g} s "
                f"({' '.join(str(error).split())[:200]}). Is it running, and the port free?"
            ) from error
    return _store


def _from_environment(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)
