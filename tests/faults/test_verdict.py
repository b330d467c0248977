"""What one rank finds wrong with a checkpoint, all ranks say."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_dyt.checkpoints.crc import _part, stored_items
from tests.ranks import Parent, Rank

pytestmark = pytest.mark.distributed


def test_both_ranks_refuse_what_one_finds(tmp_path: Path, ranks: Parent) -> None:
    whole = tmp_path / "whole"
    dcp.save({"first": torch.ones(500), "second": torch.ones(500)}, checkpoint_id=whole, no_dist=True)
    (whole / "metadata.json").write_text("{}")
    flipped = []
    for rank in (0, 1):
        copy = shutil.copytree(whole, tmp_path / f"flipped_{rank}")
        (item,) = _part(stored_items(copy), rank, 2)
        data = bytearray(item.file.read_bytes())
        data[data.index(b"data/0", item.offset) + 100] ^= 1
        item.file.write_bytes(data)
        flipped.append(item.name)
    shutil.copytree(whole, tmp_path / "missing")
    for shard in (tmp_path / "missing").glob("*.distcp"):
        shard.unlink()
    directories = [str(tmp_path / name) for name in ("whole", "flipped_0", "flipped_1", "missing")]
    log = tmp_path / "log"
    script = str(Path(__file__).with_name("two_ranks.py"))
    # A rank that waited for one that does not come would do so for PyTorch's half an hour.
    codes = ranks.run([Rank([script, *directories], str(log))] * 2, watched=True)
    printed = log.read_text()
    assert codes == [0, 0], printed[-3000:]
    for rank in (0, 1):
        said = [line for line in printed.splitlines() if f"on rank {rank}: " in line]
        assert said[0] == f"whole on rank {rank}: whole"
        assert f"({flipped[0]}): BadZipFile: Bad CRC-32" in said[1]
        assert f"({flipped[1]}): BadZipFile: Bad CRC-32" in said[2]
        assert "is missing. Restore it" in said[3]
