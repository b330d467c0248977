"""What one rank says for others."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch.distributed as dist

from megatron_dyt import log, world

_logged: set[str] = set()


def is_first_of_stage() -> bool:
    """Whether this rank is the first of its tensor and data parallel groups: one per pipeline stage."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    from megatron.core import parallel_state as mpu

    # Users of process groups of their own may not have initialized Megatron's.
    if not mpu.model_parallel_is_initialized():
        return dist.get_rank() == 0
    first = mpu.get_tensor_model_parallel_rank() == 0
    return first and mpu.get_data_parallel_rank(with_context_parallel=True) == 0


def log_once(logger: logging.Logger, line: str) -> None:
    """Log a line once per process, on one rank of each pipeline stage."""
    if line not in _logged and is_first_of_stage():
        logger.info("%s", line, extra=log.ALL_RANKS)
    _logged.add(line)


def send_to_last(topic: str, sender: int | None, senders: int, text: str, seconds: float) -> list[str]:
    """On the last rank of all the texts of all senders, in their order; elsewhere nothing.

    No collective: the key-value store of the process group carries them, so that ranks which neither send
    nor receive are not kept waiting, and devices neither.

    Args:
        topic: the same on all ranks, and used once.
        sender: this rank's number among the senders, None where it is none.
        seconds: how long the last rank waits for one text.

    Raises:
        TimeoutError: a text did not come in time.
    """
    if world.size() == 1:
        return [text]
    store = dist.distributed_c10d._get_default_store()
    if sender is not None:
        store.set(f"megatron_dyt/{topic}/{sender}", text)
    if world.rank() != world.size() - 1:
        return []
    keys = [f"megatron_dyt/{topic}/{number}" for number in range(senders)]
    try:
        store.wait(keys, timedelta(seconds=seconds))
        texts = [store.get(key).decode() for key in keys]
    except RuntimeError as error:
        raise TimeoutError(f"not all of {senders} ranks sent theirs within {seconds:g} s") from error
    for key in keys:
        store.delete_key(key)
    return texts
