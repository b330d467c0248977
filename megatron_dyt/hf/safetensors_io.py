"""Sharded safetensors written tensor by tensor, and read the same way.

The library's `save_file` wants all tensors of a file in memory. The format (an 8-byte little-endian
header length, a JSON header with each tensor's dtype, shape and byte range, then the bytes) allows
writing the header first, because the shapes are known before the values.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_dyt.errors import UserError, describe
from megatron_dyt.hf.mapping import Part, Shapes

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One file: its name and the shapes of its tensors, in their order in it."""

    file: str
    shapes: Shapes


def plan_shards(parts: Iterable[Part], dtype: torch.dtype, max_bytes: int) -> list[Shard]:
    """Fill files in order; a file holds more than `max_bytes` only where a single tensor does."""
    filled: list[Shapes] = [{}]
    used = 0
    for part in parts:
        for name, shape in part.shapes.items():
            size = tensor_bytes(shape, dtype)
            if filled[-1] and used + size > max_bytes:
                filled.append({})
                used = 0
            filled[-1][name] = shape
            used += size
    if len(filled) == 1:
        return [Shard("model.safetensors", filled[0])]
    return [
        Shard(f"model-{number:05d}-of-{len(filled):05d}.safetensors", shapes)
        for number, shapes in enumerate(filled, 1)
    ]


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def write_shards(directory: Path, parts: Iterable[Part], shards: list[Shard], dtype: torch.dtype) -> None:
    """Write `parts`, in the order in which `shards` was planned from them, and the index of the files.

    One part is in memory at a time.

    Raises:
        ValueError: a part makes tensors other than it announced.
    """
    made = _tensors(parts)
    for shard in shards:
        with (directory / shard.file).open("wb") as file:
            file.write(_header(shard.shapes, dtype))
            for name in shard.shapes:
                found, tensor = next(made)
                if found != name:
                    raise ValueError(f"{found} was made, {name} was planned")
                file.write(_bytes(tensor.to(dtype)))
    if len(shards) > 1:
        total = sum(tensor_bytes(shape, dtype) for shard in shards for shape in shard.shapes.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: shard.file for shard in shards for name in shard.shapes},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tensors(parts: Iterable[Part]) -> Iterator[tuple[str, Tensor]]:
    for part in parts:
        tensors = part.make()
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != part.shapes:
            raise ValueError(f"made {_shapes(tensors)}, announced {part.shapes}")
        for name in part.shapes:
            yield name, tensors.pop(name)


def _shapes(tensors: dict[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _header(shapes: Shapes, dtype: torch.dtype) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + tensor_bytes(shape, dtype)
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Keeps the data aligned.
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    # numpy has no bfloat16.
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


class SafetensorsReader:
    """The tensors of a directory's safetensors files, by name.

    Attributes:
        shapes, dtypes: of every tensor.

    Raises:
        UserError: there are none, or they cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise UserError(f"{directory} holds no *.safetensors file; only that format is read")
        self._open = contextlib.ExitStack()
        self._of: dict[str, object] = {}
        self.shapes: Shapes = {}
        for path in files:
            try:
                file = self._open.enter_context(safe_open(path, framework="pt"))
                for name in file.keys():  # noqa: SIM118 - not a dict
                    self._of[name] = file
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
            except Exception as error:
                raise UserError(f"{path} cannot be read ({describe(error)}). Copy it again") from error

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._of[name].get_tensor(name)  # type: ignore[attr-defined]
        return tensor

    def close(self) -> None:
        self._open.close()
