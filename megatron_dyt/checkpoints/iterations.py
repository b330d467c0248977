"""A directory of Megatron checkpoints on disk: what its tracker names, which iterations are complete.

Megatron writes `iter_NNNNNNN/`, then its `metadata.json`, then the tracker file with the number. A
process that dies on the way leaves a directory without a whole `metadata.json`, or in the worst moment an
empty tracker, with which Megatron later neither resumes nor fails but exits with code 0.
"""

import json
import os
import re
import shutil
from pathlib import Path

from megatron_dyt.atomic import write_atomically
from megatron_dyt.errors import UserError


class DamagedCheckpoint(UserError):
    """A checkpoint that is there but not whole: an earlier one may be."""


TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # What the tracker may hold in place of a number: a checkpoint without an iteration.
OTHER_CHECKPOINT = "load an earlier checkpoint with --ckpt-step N, or let --dyt-load-fallback find one"
_ITERATION = re.compile(r"iter_(\d{7,})")
# What Megatron's torch_dist format writes before metadata.json; anything else is not ours to remove.
_PARTS = re.compile(r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|common\.pt|metadata\.json")


# --- which iteration is meant ---------------------------------------------------------------------


def last_iteration(directory: str | Path) -> str | None:
    """What the tracker names: an iteration such as "300", or `RELEASE`; None without a tracker.

    Raises `UserError` when the tracker is empty or holds something else: Megatron would exit with code 0.
    """
    text = _tracker_text(directory)
    if text is not None and not text.isdecimal() and text != RELEASE:
        raise UserError(
            f"{Path(directory) / TRACKER} holds {text!r}; it must hold the number of an iteration (or "
            f"{RELEASE!r}). Write into it the number of a complete checkpoint; there: "
            f"{listed(directory)}"
        )
    return text


def _tracker_text(directory: str | Path) -> str | None:
    tracker = Path(directory) / TRACKER
    # A damaged file may hold any bytes.
    return tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else None


def iteration_to_load(directory: str | Path, step: int | None) -> str | None:
    """What Megatron loads from `directory` with `--ckpt-step step`; None when there is nothing to load.

    It reads the tracker first all the same, and takes a release whatever the step is
    (megatron/training/checkpointing.py, `_load_base_checkpoint`).
    """
    named = last_iteration(directory)
    return str(step) if step and named != RELEASE else named


def missing_tracker(directory: str | Path) -> str:
    """What is wrong with a `directory` without a tracker, and what to give in its place."""
    root = Path(directory)
    hint = "Give the directory that training saved to (--save)"
    iteration = _ITERATION.fullmatch(root.name)
    if iteration:
        hint = f"It is one iteration of a checkpoint: give {root.parent} and --ckpt-step {int(iteration[1])}"
    elif complete_iterations(root):
        hint = f"Choose one of its iterations with --ckpt-step: {listed(root)}"
    return f"there is no checkpoint (no {TRACKER}). {hint}"


def listed(directory: str | Path) -> str:
    """The complete iterations of a directory for a message: "2, 4", or "none"."""
    return ", ".join(map(str, complete_iterations(Path(directory)))) or "none"


def iteration_directory(directory: str | Path, iteration: str) -> Path:
    """`iter_0000300` for "300"; the directory need not exist."""
    name = iteration if iteration == RELEASE else f"iter_{int(iteration):07d}"
    return Path(directory) / name


# --- complete, interrupted, damaged ---------------------------------------------------------------


def tidy(directory: str | Path) -> list[str]:
    """Remove what an interrupted save left, mend an empty tracker; returns what was done.

    The tracker then names the newest complete checkpoint.
    """
    root = Path(directory)
    done = []
    named = _tracker_text(root)
    tracked = iteration_directory(root, named) if named and named.isdecimal() else None
    for path in sorted(root.glob("iter_*")):
        # What the tracker names was complete once: if it is damaged now, that is not ours to remove.
        if path != tracked and _is_interrupted_save(path):
            # Another rank may still be writing there; what it leaves is removed at the next start.
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                done.append(f"removed the incomplete checkpoint {path}")
    complete = complete_iterations(root)
    if named == "" and complete:
        _track(root, complete[-1])
        done.append(f"set the empty {root / TRACKER} to {complete[-1]}, the last complete checkpoint")
    return done


def check_readable(directory: str | Path, iteration: str) -> None:
    """Raise `UserError` unless the torch_dist files of a checkpoint are there at full length."""
    path = iteration_directory(directory, iteration)
    if not path.is_dir():
        raise DamagedCheckpoint(
            f"checkpoint {path} does not exist; complete checkpoints there: {listed(directory)}"
        )
    check_files(path)


def check_files(path: Path) -> None:
    """Raise `DamagedCheckpoint` unless the torch_dist files of `iter_NNNNNNN` are there at full length."""
    if (not any(path.glob("*.distcp")) and not (path / ".metadata").is_file()) or _is_complete_dcp(path):
        return  # Another format (--ckpt-format), whose files Megatron checks itself.
    other = f"{OTHER_CHECKPOINT}; complete there: {listed(path.parent)}"
    if not _has_config(path) or not (path / ".metadata").is_file():
        raise DamagedCheckpoint(f"checkpoint {path} is incomplete: it has no metadata. {other}")
    for name, length in _needed_lengths(path).items():
        file = path / name
        present = file.stat().st_size if file.is_file() else None
        if present is None or present < length:
            state = "missing" if present is None else f"truncated: {present} of {length} bytes"
            raise DamagedCheckpoint(f"checkpoint file {file} is {state}. Restore it, or: {other}")


def earlier_complete(path: Path) -> list[Path]:
    """The complete checkpoints of the same directory with a lower iteration, the last one first."""
    own = _ITERATION.fullmatch(path.name)
    if own is None:
        return []
    earlier = [number for number in complete_iterations(path.parent) if number < int(own[1])]
    return [iteration_directory(path.parent, str(number)) for number in reversed(earlier)]


def set_aside(path: Path, tracked: Path) -> Path:
    """Rename a damaged checkpoint, and let the tracker name `tracked`; returns the new name."""
    to = path.with_name(f"{path.name}.damaged")
    number = 1
    while to.exists():
        number += 1
        to = path.with_name(f"{path.name}.damaged{number}")
    match = _ITERATION.fullmatch(tracked.name)
    assert match is not None
    _track(path.parent, int(match[1]))
    os.replace(path, to)
    return to


def _needed_lengths(path: Path) -> dict[str, int]:
    """For each data file of a torch_dist checkpoint, the bytes that its metadata refers to."""
    from megatron_dyt.checkpoints.metadata import read_metadata

    try:
        storage = read_metadata(path).storage_data
    except UserError:
        raise
    except Exception as error:
        raise DamagedCheckpoint(
            f"the metadata of checkpoint {path} cannot be read ({error}). Restore it, or: {OTHER_CHECKPOINT}"
        ) from error
    lengths: dict[str, int] = {}
    for item in storage.values():
        end = item.offset + item.length
        lengths[item.relative_path] = max(end, lengths.get(item.relative_path, 0))
    return lengths


def _is_complete_dcp(path: Path) -> bool:
    """A checkpoint of --ckpt-format torch_dcp or fsdp_dtensor: `.metadata`, written last, is all it has.

    torch_dist has what is not sharded, too: as an item of its own from Megatron 0.19 on, before that as a
    file.
    """
    metadata = path / ".metadata"
    if not metadata.is_file() or any((path / name).exists() for name in ("common.pt", "metadata.json")):
        return False
    return b"common_state" not in metadata.read_bytes()


def _has_config(path: Path) -> bool:
    """Whether the file that Megatron writes last is there and whole."""
    try:
        return isinstance(json.loads((path / "metadata.json").read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _is_interrupted_save(path: Path) -> bool:
    if not _ITERATION.fullmatch(path.name) or _has_config(path) or _is_complete_dcp(path):
        return False
    try:
        (path / "metadata.json").read_bytes()
    except FileNotFoundError:
        pass
    except OSError:  # It cannot be read: file systems fail for a while, and that is no interruption.
        return False
    return path.is_dir() and all(_PARTS.fullmatch(part.name) for part in path.iterdir())


def complete_iterations(root: Path) -> list[int]:
    """The numbers of the checkpoints in a directory that are whole, the earliest first."""
    configs = root.glob("iter_*/metadata.json")
    found = (_ITERATION.fullmatch(path.parent.name) for path in configs if _has_config(path.parent))
    return sorted(int(match[1]) for match in found if match)


def _track(root: Path, iteration: int) -> None:
    write_atomically(root / TRACKER, str(iteration).encode())
