"""Errors meant for people, and the one way an entry point ends.

A mistake of the user is a `UserError`: one line that says what was given, what is allowed and what to
do, and exit code 2. A `TrainingFault` is one line too, and exit code 1. Everything else keeps its
traceback (it is a defect or a fault of the machine, and the traceback is what we need), followed by one
closing line, and exit code 1. When nobody reads our output any more (`| head`), the end is silent.
"""

import errno
import linecache
import logging
import os
import re
import select
import signal
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_dyt import log

_log = logging.getLogger(__name__)


class UserError(ValueError):
    """Wrong input. The message says what was given, what is allowed and what to do."""


class TrainingFault(RuntimeError):
    """Training must not go on: values that are not finite, a bad alpha. The message says where."""


# A command whose output nobody reads ends with this code, as if by SIGPIPE.
UNREAD = 128 + signal.SIGPIPE

_OS_HINTS = {
    errno.ENOSPC: "the disk is full; free space or write elsewhere, then start again: it goes on from "
    "what is complete, in training from the last complete checkpoint",
    errno.EDQUOT: "the disk quota is used up; free space or write elsewhere, then start again: it goes on "
    "from what is complete, in training from the last complete checkpoint",
    errno.EFBIG: "a file grew past the allowed size (ulimit -f); raise it, then start again",
    errno.EACCES: "permission denied; check the directory's owner and mode",
    errno.EROFS: "the file system is read-only; write elsewhere",
}


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit the process with its code; see the module's docstring for failures."""
    # None where it was closed (cron, a daemon): what is printed is lost then, and nothing else.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    log.show()
    try:
        code = main() or 0
    except UserError as error:
        _last_words(f"error: {error}")
        code = 2
    except TrainingFault as fault:
        _last_words(f"stopped: {fault}")
        code = 1
    except KeyboardInterrupt as stop:
        _last_words("; ".join(filter(None, ["interrupted", str(stop)])))
        code = 128 + signal.SIGINT
    except SystemExit:
        raise
    # BaseException: PyTorch's CheckpointException is one.
    except BaseException as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads_stdout():
            code = UNREAD
        else:
            traceback.print_exc()
            cause = root_user_error(error)
            _last_words(f"error: {cause}" if cause else f"stopped: {describe(error)}")
            code = 2 if cause else 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter tries once more as it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = UNREAD
    sys.stderr.flush()
    sys.exit(code)


def _nobody_reads_stdout() -> bool:
    """Whether standard output is a pipe whose reader has gone: other pipes that break are faults."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # POLLERR is reported whatever is asked for.
    except (OSError, ValueError):  # It is no file.
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def root_user_error(error: BaseException) -> UserError | None:
    """The `UserError` that `error` wraps, if any: Megatron re-raises what a spec's module raised."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, UserError):
            return link
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return None


def some(words: Sequence[str], most: int = 4) -> str:
    """The first words, and how many more there are."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def describe(error: BaseException) -> str:
    """One line for `error`: its type, its message, and what to do where that is known."""
    text = " ".join(str(error).split())
    text = text + _flags_in(text, error) if text else _condition(error)
    hint = _OS_HINTS.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    return f"{type(error).__name__}: {text}" + (f" ({hint})" if hint else "")


def _flags_in(text: str, error: BaseException) -> str:
    """The flags that `text` calls by the names of Megatron's arguments: seq_length is --seq-length."""
    holders = [frame.f_locals.get("args") for frame, _ in traceback.walk_tb(error.__traceback__)]
    args = next((vars(each) for each in holders if isinstance(each, Namespace)), {})
    names = dict.fromkeys(name for name in re.findall(r"[a-z]+(?:_[a-z]+)+", text) if name in args)
    given = ", ".join(f"--{name.replace('_', '-')} {args[name]}" for name in names)
    return f"; flags: {given}" if given else ""


def _condition(error: BaseException) -> str:
    """The statement that raised an error without text: Megatron asserts much without a word.

    A name `args.this` in it is the flag --this; its value is given.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return "no message"
    frame, number = frames[-1]
    summary = traceback.extract_tb(error.__traceback__)[-1]
    first, last = summary.lineno or number, summary.end_lineno or number
    lines = [linecache.getline(summary.filename, line) for line in range(first, last + 1)]
    source = " ".join(" ".join(lines).split())
    if not source:
        return "no message"
    values: dict[str, None] = {}
    for owner, name in re.findall(r"\b(args|config|self)\.([a-z]\w*)", source):
        holder = frame.f_locals.get(owner)
        if holder is not None and hasattr(holder, name):
            value = getattr(holder, name)
            if value is None or isinstance(value, bool | int | float | str):
                flag = f"--{name.replace('_', '-')} {value}"
                values[flag if owner == "args" else f"{name} = {value}"] = None
    given = f"; here {', '.join(values)}" if values else ""
    place = f"{os.path.basename(summary.filename)}:{number}"
    failed = "does not hold" if isinstance(error, AssertionError) else "raised it"
    return f"`{source}` {failed} ({place}){given}"


def _last_words(line: str) -> None:
    _log.error("%s", line, extra=log.ALL_RANKS)
