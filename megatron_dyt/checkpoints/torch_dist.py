"""Tensors of a Megatron torch_dist checkpoint, read and written one at a time.

Megatron's own load and save hold a whole rank's model in memory and need its model built. Here a part of
one tensor is read straight from the files, whatever parallel layout wrote them, and a checkpoint is
written from functions that make each tensor when its turn has come.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_dyt.checkpoints.metadata import damaged, is_optimizer, read_metadata
from megatron_dyt.errors import UserError

# Megatron's CheckpointingConfig; 0.19 ignores the common backend, earlier versions want it.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Threads that write, a file each: the checksums of what is written take longer than the writing.
_WRITERS = 2


class TorchDistReader:
    """The model tensors of one checkpoint directory (`.../iter_0000100`).

    Attributes:
        tensors: shape and dtype by key; the optimizer's and other state's are left out.

    Raises:
        UserError: the directory's metadata or a file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self._metadata = read_metadata(directory)
            self._files = FileSystemReader(directory)
            self._files.set_up_storage_reader(self._metadata, is_coordinator=True)
        except UserError:
            raise
        except Exception as error:
            raise damaged(directory, error) from error
        self.tensors: dict[str, tuple[torch.Size, torch.dtype]] = {
            key: (entry.size, entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not is_optimizer(key)
        }

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """The tensor `key` on the CPU, or its part [layer] without the first dimension."""
        size, dtype = self.tensors[key]
        offsets, sizes = [0] * len(size), list(size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        return self._read_box(key, offsets, sizes, dtype).view(sizes if layer is None else sizes[1:])

    def _read_box(self, key: str, offsets: list[int], sizes: list[int], dtype: torch.dtype) -> Tensor:
        target = torch.empty(sizes, dtype=dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        stored = cast(TensorStorageMetadata, self._metadata.state_dict_metadata[key])
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        if covered != target.numel():
            lacking = ValueError(f"{key} has {covered} of {target.numel()} values at {tuple(offsets)}")
            raise damaged(self.directory, lacking)
        try:
            self._files.read_data(LoadPlan(items), cast(LoadPlanner, _Into(target))).wait()
        except Exception as error:
            raise damaged(self.directory, error) from error
        return target


class _Into:
    """The two calls of a LoadPlanner that reading tensors needs: everything goes into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        part = self.target
        for dimension, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(dimension, start, length)
        return part

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """The part is a view of the target: nothing is left to do."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to be written: global shape, and one function a chunk along the first dimension.

    `make[i]` returns chunk i, whose shape is `shape` with the first dimension divided by len(make).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Sequence[Callable[[], Tensor]]

    @property
    def chunk(self) -> tuple[int, ...]:
        return (self.shape[0] // len(self.make), *self.shape[1:])


def write_torch_dist(
    directory: Path,
    tensors: dict[str, LazyTensor],
    common: dict[str, Any],
    objects: dict[str, Any] | None = None,
) -> None:
    """Write a torch_dist checkpoint directory that every supported Megatron version reads.

    Each of two threads has one chunk in memory. `metadata.json`, by which Megatron knows a complete
    checkpoint, comes last.

    Args:
        directory: must not exist, or be empty.
        tensors: by Megatron's key.
        common: what Megatron stores unsharded (args, iteration, checkpoint_version).
        objects: Megatron's sharded objects by their unique key (`name/shard_0_2`).
    """
    directory.mkdir(parents=True, exist_ok=True)
    items = [
        _write_item(key, tensor, number)
        for key, tensor in tensors.items()
        for number in range(len(tensor.make))
    ]
    streams = {key: _pickled(value) for key, value in (objects or {}).items()}
    items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in streams]
    stored = {key: _stored(tensor) for key, tensor in tensors.items()}
    writer = FileSystemWriter(directory)
    writer.set_up_storage_writer(is_coordinator=True)
    results = _write_items(writer, items, _From(tensors, streams))
    writer.finish(Metadata({**stored, **dict.fromkeys(streams, BytesStorageMetadata())}), results)
    torch.save(common, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_FORMAT))


def _write_items(writer: FileSystemWriter, items: list[WriteItem], source: _From) -> list[list[WriteResult]]:
    """Not by the writer's own threads: what is raised in one of those is lost, and the file with it."""
    plans = [writer.prepare_local_plan(SavePlan(items[first::_WRITERS])) for first in range(_WRITERS)]
    with ThreadPoolExecutor(_WRITERS) as threads:
        writes = [
            threads.submit(writer.write_data, plan, cast(SavePlanner, source))
            for plan in writer.prepare_global_plan(plans)
        ]
        try:
            return [write.result().wait() for write in as_completed(writes)]
        except BaseException:
            source.stopped = True
            raise


def _pickled(value: Any) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save([value], stream)  # Megatron wraps an object in a list.
    return stream


def _write_item(key: str, tensor: LazyTensor, number: int) -> WriteItem:
    chunk = _chunks(tensor)[number]
    data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape))
    return WriteItem(MetadataIndex(key, chunk.offsets, number), WriteItemType.SHARD, tensor_data=data)


def _chunks(tensor: LazyTensor) -> list[ChunkStorageMetadata]:
    sizes = torch.Size(tensor.chunk)
    rest = [0] * (len(sizes) - 1)
    return [
        ChunkStorageMetadata(torch.Size([number * sizes[0], *rest]), sizes)
        for number in range(len(tensor.make))
    ]


def _stored(tensor: LazyTensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), _chunks(tensor)
    )


class _From:
    """The call of a SavePlanner that writing needs: makes a chunk when it is written.

    Threads may share it; when one has failed, the others need not go on, and `stopped` ends them.
    """

    def __init__(self, tensors: dict[str, LazyTensor], streams: dict[str, io.BytesIO]) -> None:
        self.tensors = tensors
        self.streams = streams
        self.stopped = False

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        if self.stopped:
            raise InterruptedError(f"{item.index.fqn} is not written: another thread has failed")
        if item.type == WriteItemType.BYTE_IO:
            return self.streams[item.index.fqn]
        tensor = self.tensors[item.index.fqn]
        made = tensor.make[item.index.index or 0]()
        if tuple(made.shape) != tensor.chunk or made.dtype != tensor.dtype:
            raise ValueError(
                f"{item.index.fqn}: {tuple(made.shape)} {made.dtype} was made, "
                f"{tensor.chunk} {tensor.dtype} was announced"
            )
        return made.contiguous()
