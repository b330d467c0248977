"""Reading any layout of a torch_dist checkpoint, and writing one that Megatron reads."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_dyt.checkpoints import torch_dist
from megatron_dyt.checkpoints.torch_dist import LazyTensor, TorchDistReader, write_torch_dist
from megatron_dyt.errors import UserError

VALUES = torch.arange(4 * 6 * 10, dtype=torch.float32).reshape(4, 6, 10)


def write_blocks(
    directory: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[tuple[slice, slice, slice]]
) -> None:
    """VALUES in blocks, as tensor and pipeline parallel ranks leave them: one file each."""
    chunks = [
        ChunkStorageMetadata(torch.Size(s.start for s in block), torch.Size(s.stop - s.start for s in block))
        for block in blocks
    ]

    def items(key: str, tensor: LazyTensor, number: int) -> WriteItem:
        data = TensorWriteData(chunks[number], torch_dist.TensorProperties(dtype=tensor.dtype), VALUES.shape)
        return WriteItem(
            MetadataIndex(key, chunks[number].offsets, number), WriteItemType.SHARD, tensor_data=data
        )

    class From:
        def __init__(self, *_: object) -> None: ...

        def resolve_data(self, item: WriteItem) -> torch.Tensor:
            return VALUES[blocks[item.index.index or 0]].contiguous()

    with monkeypatch.context() as patch:
        patch.setattr(torch_dist, "_write_item", items)
        patch.setattr(torch_dist, "_From", From)
        patch.setattr(
            torch_dist,
            "_stored",
            lambda tensor: TensorStorageMetadata(
                torch_dist.TensorProperties(dtype=tensor.dtype), VALUES.shape, chunks
            ),
        )
        lazy = LazyTensor(tuple(VALUES.shape), VALUES.dtype, [lambda: VALUES] * len(blocks))
        write_torch_dist(directory, {"w": lazy}, {})


TWO_BY_TWO = [
    (slice(layer, layer + 1), slice(row, row + 3), slice(column, column + 5))
    for layer in range(4)
    for row in (0, 3)
    for column in (0, 5)
]
LAYERS_TOGETHER = [
    (slice(0, 3), slice(0, 6), slice(0, 10)),
    (slice(3, 4), slice(0, 2), slice(0, 10)),
    (slice(3, 4), slice(2, 6), slice(0, 10)),
]


@pytest.mark.parametrize("blocks", [TWO_BY_TWO, LAYERS_TOGETHER])
def test_reads_any_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[tuple[slice, slice, slice]]
) -> None:
    write_blocks(tmp_path / "c", monkeypatch, blocks)
    reader = TorchDistReader(tmp_path / "c")
    assert reader.tensors == {"w": (VALUES.shape, torch.float32)}
    assert torch.equal(reader.read("w"), VALUES)
    for layer in range(4):
        assert torch.equal(reader.read("w", layer), VALUES[layer])


def test_incomplete_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_blocks(tmp_path / "c", monkeypatch, TWO_BY_TWO[:-1])
    reader = TorchDistReader(tmp_path / "c")
    assert torch.equal(reader.read("w", 2), VALUES[2])
    with pytest.raises(UserError, match=r"w has 45 of 60 values at \(3, 0, 0\)"):
        reader.read("w", 3)


def test_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_blocks(tmp_path / "c", monkeypatch, TWO_BY_TWO)
    for data in (tmp_path / "c").glob("*.distcp"):
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(UserError, match="incomplete or damaged"):
        TorchDistReader(tmp_path / "c").read("w")
    (tmp_path / "c" / ".metadata").unlink()
    with pytest.raises(UserError, match="incomplete or damaged"):
        TorchDistReader(tmp_path / "c")


def test_writes_lazily_and_whole(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str, value: torch.Tensor) -> torch.Tensor:
        made.append(name)
        return value

    tensors = {
        "stacked": LazyTensor((2, 3), torch.bfloat16, [lambda: make("0", torch.ones(1, 3).bfloat16())] * 2),
        "single": LazyTensor((4,), torch.float32, [lambda: make("s", torch.arange(4.0))]),
    }
    write_torch_dist(tmp_path / "c", tensors, {"args": Namespace(a=1), "iteration": 1})
    assert sorted(made) == ["0", "0", "s"]
    from megatron.core import dist_checkpointing

    assert dist_checkpointing.check_is_distributed_checkpoint(str(tmp_path / "c"))
    assert dist_checkpointing.load_common_state_dict(str(tmp_path / "c"))["args"].a == 1
    reader = TorchDistReader(tmp_path / "c")
    assert torch.equal(reader.read("stacked", 1), torch.ones(3).bfloat16())
    assert torch.equal(reader.read("single"), torch.arange(4.0))


def test_part_of_another_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x: \(2,\) .* was made, \(3,\)"):
        write_torch_dist(tmp_path, {"x": LazyTensor((3,), torch.float32, [lambda: torch.ones(2)])}, {})
