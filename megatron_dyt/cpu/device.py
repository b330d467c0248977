"""The choice of device that every entry point offers: `--device {auto,cpu,cuda}`."""

import logging
import os
from collections.abc import Sequence

import torch

from megatron_dyt import cpu
from megatron_dyt.errors import UserError

_log = logging.getLogger(__name__)

CHOICES = ("auto", "cpu", "cuda")
VARIABLE = "MEGATRON_DYT_DEVICE"


def activate(argv: list[str]) -> list[str]:
    """Remove `--device` from `argv`, make that device the one Megatron uses, return the rest.

    The default is the environment variable MEGATRON_DYT_DEVICE, else `auto`: CUDA when there is a
    device, otherwise the CPU, with a line on rank 0 that says so. Call it before anything of
    `megatron.training` is used. Raises `UserError` for an unknown choice, for `cuda` without a CUDA
    device and for `cpu` in a process that already uses CUDA.
    """
    choice, rest = split(argv)
    if choice not in CHOICES:
        raise UserError(f"--device {choice!r} (or {VARIABLE}): allowed are {', '.join(CHOICES)}")
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda was given, but PyTorch finds no CUDA device. Check the driver and "
            "CUDA_VISIBLE_DEVICES, or train on the CPU with --device cpu"
        )
    if choice == "auto" and not torch.cuda.is_available():
        _log.info("no CUDA device found: using the CPU (choose with --device)")
        choice = "cpu"
    if choice == "cpu":
        cpu.enable()
    return rest


def split(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The device that `argv` or the environment names, as it is written there, and the other arguments."""
    choice = os.environ.get(VARIABLE) or "auto"
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--device":
            choice = next(words, "")
        elif word.startswith("--device="):
            choice = word.removeprefix("--device=")
        else:
            rest.append(word)
    return choice, rest
