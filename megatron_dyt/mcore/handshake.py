"""All ranks of a DyT run have the same plugin, Megatron, PyTorch and DyT settings, or none starts.

Ranks that differ would build other parameters, which shows as a hang or, worse, not at all. They compare
before the process group is made, with a time-out (`rendezvous.py`), so that a rank which runs without
the plugin is named instead of waited for.
"""

import contextlib
import functools
import hashlib
import json
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_dyt import compat
from megatron_dyt.config import is_dyt
from megatron_dyt.rendezvous import Exchange, ranks, time_out
from megatron_dyt.version import __version__

TOPIC = "handshake"
_ERROR = "error"

_suspended = False


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Where Megatron's flags are validated for a world that does not exist: nobody to compare with."""
    global _suspended
    before, _suspended = _suspended, True
    try:
        yield
    finally:
        _suspended = before


def compare_ranks(args: Namespace) -> None:
    """Raise UserError on every rank unless all of them run the same; TrainingFault if one is not heard of.

    Args:
        args: Megatron's args, validated.
    """
    exchange = _exchange(args)
    if exchange is None:
        return
    exchange.settle(json.dumps(identity(args)), differences)


def leave(args: Namespace, reason: BaseException) -> None:
    """Tell the other ranks that this one stops before it could compare."""
    exchange = _exchange(args)
    if exchange is not None:
        # It fails anyway: no reason to wait for the others as long as for a start.
        exchange.seconds = min(exchange.seconds, 30.0)
        text = " ".join(str(reason).split()) or type(reason).__name__
        exchange.leave(json.dumps({_ERROR: text}) if exchange.rank > 0 else text)


def _exchange(args: Namespace) -> Exchange | None:
    if not is_dyt(args) or _suspended or getattr(args, "fake_process_group", False):
        return None
    if getattr(args, "inprocess_restart", False):
        # Ranks in reserve do not come here, and after a restart each rank has another number of
        # exchanges behind it.
        return None
    exchange = Exchange(TOPIC, time_out(args))
    return exchange if exchange.world > 1 else None


def identity(args: Namespace) -> dict[str, str]:
    """What must be the same on all ranks, by the name that the message uses."""
    settings = {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in sorted(vars(args).items())
        if name.startswith("dyt_") or name in ("embedding_scale", "normalization")
    }
    return settings | {
        "megatron_dyt": f"{__version__} (code {code_digest()})",
        "megatron-core": compat.megatron_build(),
        "torch": str(torch.__version__),
        "host": socket.gethostname(),
    }


@functools.cache
def code_digest() -> str:
    """Short hash of this package's source: two checkouts may have one version number."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def differences(texts: dict[int, str]) -> str:
    """What differs between the ranks' identities, as a message; empty when nothing does."""
    found = {rank: json.loads(text) for rank, text in texts.items()}
    for rank, identity in found.items():
        if _ERROR in identity:
            return f"rank {rank} stopped: {identity[_ERROR]}"
    hosts = {rank: identity.pop("host") for rank, identity in found.items()}
    lines = []
    for name in dict.fromkeys(name for identity in found.values() for name in identity):
        by_value: dict[str, list[int]] = {}
        for rank, identity in found.items():
            by_value.setdefault(identity.get(name, "not there"), []).append(rank)
        if len(by_value) > 1:
            values = (f"{value} on {ranks(who)} ({hosts[who[0]]})" for value, who in by_value.items())
            lines.append(f"{name} is {', '.join(values)}")
    if not lines:
        return ""
    return f"the ranks differ: {'; '.join(lines)}. Give all of them the same flags and installation."
