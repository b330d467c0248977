"""Directories of models: complete or absent, and the safetensors files in one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from megatron_dyt.atomic import partial_path
from megatron_dyt.errors import UserError, describe
from megatron_dyt.log import progress_bar

INDEX = "model.safetensors.index.json"
# `convert` holds one file's tensors in memory. Smaller files are many: a 70B has 70 of these in bf16.
MAX_SHARD_BYTES = 2 * 10**9
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def size_in_bytes(text: str) -> int:
    """Bytes of a size such as 500MB or 5GB; ValueError for anything else."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise ValueError(f"{text!r} given; give a size such as 500MB or 5GB")
    return int(match[1]) * _UNITS[(match[2] or "").upper()]


def check_free(flag: str, directory: Path) -> None:
    """Raise UserError unless `directory` (given with `flag`) does not exist, or is empty and replaceable."""
    if directory.is_dir() and (directory.is_symlink() or os.path.ismount(directory) or not directory.name):
        raise UserError(
            f"{flag} {directory} is a link, a mount point or the current directory, which the finished one "
            "cannot replace; give a new directory inside it"
        )
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        kind = "is a directory that is not empty" if directory.is_dir() else "exists"
        raise UserError(f"{flag} {directory} {kind}; give a new directory, or remove it first")


def check_space(flag: str, directory: Path, needed: int) -> None:
    """Raise UserError unless the file system of `directory` has `needed` bytes free."""
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{flag} {directory}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free there. "
            "Free space, or write elsewhere"
        )


@contextlib.contextmanager
def whole_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory beside `directory` that takes its name when the block ends well.

    It vanishes when the block fails; what a killed process left of it is removed by the next one.
    """
    partial = partial_path(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _follow_umask(partial)
        # Replaces an empty directory.
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _follow_umask(directory: Path) -> None:
    """Give safetensors files the mode of any new file: transformers' are for their owner alone."""
    probe = directory / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in directory.glob("*.safetensors"):
        path.chmod(mode)


def read_config(load: Path) -> dict[str, Any]:
    """The config.json of the Hugging Face model that was given as --load.

    Raises:
        UserError: there is none.
    """
    try:
        config: dict[str, Any] = json.loads((load / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--load {load}: no readable config.json there ({describe(error)}). Give a Hugging Face model's "
            "directory"
        ) from error
    return config


def write_tensors(
    directory: Path,
    planned: Mapping[str, Tensor],
    make: Callable[[Sequence[str]], Iterator[dict[str, Tensor]]],
    max_bytes: int,
) -> None:
    """Write safetensors files, and their index where there are several.

    What `make` yields last is written while it makes the next: two such parts are in memory.

    Args:
        planned: every tensor by name, on the meta device.
        make: the tensors of these names, contiguous, in parts of any size and order.
        max_bytes: of a file's tensors; a larger tensor has a file of its own.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    # Not its twin for torch, which takes the size of a view for that of the tensor it is a view of.
    split = split_state_dict_into_shards_factory(
        dict(planned),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    with progress_bar("write", len(split.filename_to_tensors), " files") as bar:
        for file, names in split.filename_to_tensors.items():
            _write_file(directory / file, {name: planned[name] for name in names}, make(names))
            bar.update()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, planned: Mapping[str, Tensor], parts: Iterator[dict[str, Tensor]]) -> None:
    """One safetensors file. The library's own writer wants all its tensors in memory at once.

    Source: the format's description, https://huggingface.co/docs/safetensors: the header's length (8 bytes,
    little-endian), the header (JSON), and the data, to whose start the offsets refer.
    """
    # The metadata that transformers expects of a file of PyTorch tensors.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in planned.items():
        place, end = [end, end + tensor.nbytes], end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # Readers map the file and want the data aligned.
    missing = dict(planned)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            start = file.tell()
            for name, tensor in (each for part in ahead(parts) for each in part.items()):
                plan = missing.pop(name)
                if (tensor.shape, tensor.dtype) != (plan.shape, plan.dtype):
                    raise ValueError(
                        f"{name}: {tensor.shape} {tensor.dtype} was made, not {plan.shape} {plan.dtype}"
                    )
                file.seek(start + header[name]["data_offsets"][0])
                file.write(tensor.view(torch.uint8).numpy())
    except OSError as error:  # A write's own has no file's name.
        raise OSError(error.errno, error.strerror, str(path)) from error
    if missing:
        raise ValueError(f"{', '.join(missing)} was not made")


def ahead[T](items: Iterable[T]) -> Iterator[T]:
    """The same items, each made in a second thread while the one before it is used; two are in memory."""
    rest = iter(items)
    end = object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, rest, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, rest, end)
            yield cast(T, item)


class SafetensorsReader:
    """The tensors of a directory's safetensors files, by name.

    Attributes:
        shapes: of every tensor.

    Raises:
        UserError: there are none, or they cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory} holds no *.safetensors file; only that format is read")
        self._open = contextlib.ExitStack()
        self._file_of: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
                for name in file.keys():  # noqa: SIM118 - not a dict
                    self._file_of[name] = file
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except Exception as error:
                raise UserError(f"{path} cannot be read ({describe(error)}). Copy it again") from error

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor

    def close(self) -> None:
        self._open.close()
