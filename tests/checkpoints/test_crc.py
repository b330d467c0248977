"""Flipped bits are found by the checksums that PyTorch writes and does not look at."""

import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_dyt.checkpoints import crc
from megatron_dyt.checkpoints.crc import Item, find_damage, stored_items, weights_hash
from tests.bits import flip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = {"weight": torch.randn(200), "bias": torch.randn(30)}
    dcp.save(state, checkpoint_id=tmp_path / "c", no_dist=True)
    torch.save({"args": 1}, tmp_path / "c" / "common.pt")
    return tmp_path / "c"


def everything(_name: str) -> bool:
    return True


def flip_value(item: Item, bit: int = 0) -> None:
    """Of a one-tensor archive."""
    flip(item.file, place_of(item, b"data/0") + 100, bit)  # Less than 64 bytes of padding come first.


def place_of(item: Item, text: bytes) -> int:
    return item.file.read_bytes().index(text, item.offset)


def item_of(directory: Path, name: str) -> Item:
    (item,) = [each for each in stored_items(directory) if each.name.split("/")[0] == name][:1]
    return item


def test_a_whole_checkpoint_has_no_damage(saved: Path) -> None:
    assert find_damage(saved, everything) is None
    names = {item.name for item in stored_items(saved)}
    assert names >= {"weight", "bias", "common_state"}


def test_a_flip_that_torch_does_not_see_is_found_and_placed(saved: Path) -> None:
    item = item_of(saved, "weight")
    before = {"weight": torch.zeros(200)}
    dcp.load(before, checkpoint_id=saved, no_dist=True)
    flip_value(item, bit=6)
    loaded = {"weight": torch.zeros(200)}
    dcp.load(loaded, checkpoint_id=saved, no_dist=True)
    assert not torch.equal(loaded["weight"], before["weight"])
    found = find_damage(saved, everything)
    assert found is not None
    assert found.startswith(str(item))
    assert "Bad CRC-32" in found


def test_only_what_is_wanted_is_looked_at_and_what_is_common(saved: Path) -> None:
    item = item_of(saved, "weight")
    flip_value(item)
    assert find_damage(saved, lambda name: name == "bias") is None
    flip_value(item)
    common = item_of(saved, "common_state")
    flip(common.file, place_of(common, b"args"))
    assert find_damage(saved, lambda _name: False) is not None


def test_no_flip_changes_what_is_loaded_unnoticed(saved: Path) -> None:
    """Any bit of any item: it is found, or makes no difference to what torch loads."""
    generator = random.Random(3)
    items = stored_items(saved)
    found = 0
    for _ in range(120):
        item = generator.choice(items)
        whole = value_of(item)
        place = item.file, item.offset + generator.randrange(item.length), generator.randrange(8)
        flip(*place)
        if find_damage(saved, everything) is None:
            assert same(value_of(item), whole), item
        else:
            found += 1
        flip(*place)
    assert found > 30


def value_of(item: Item) -> Any:
    with item.file.open("rb") as file:
        return torch.load(crc._Slice(file, item.offset, item.length), weights_only=False)


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


@pytest.mark.parametrize("ranks", [1, 2, 3, 50])
def test_the_ranks_parts_are_the_whole(saved: Path, ranks: int) -> None:
    items = stored_items(saved)
    parts = [list(crc._part(items, rank, ranks)) for rank in range(ranks)]
    assert list(itertools.chain(*parts)) == items
    item = item_of(saved, "bias")
    flip_value(item)
    assert sum(find_damage(saved, everything, rank, ranks) is not None for rank in range(ranks)) == 1


def test_truncated_and_foreign_data_are_damage(saved: Path) -> None:
    data = item_of(saved, "weight").file
    data.write_bytes(data.read_bytes()[:-100])
    assert find_damage(saved, everything) is not None
    data.write_bytes(b"x" * 5000)
    assert "not as torch.save writes" in str(find_damage(saved, everything))
    data.unlink()
    assert "FileNotFoundError" in str(find_damage(saved, everything))


def test_the_hash_of_the_weights_is_theirs_wherever_they_are(saved: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(saved, tmp_path / "elsewhere")
    assert weights_hash(copy) == weights_hash(saved)
    other = {"weight": torch.ones(200), "bias": torch.ones(30)}
    dcp.save(other, checkpoint_id=tmp_path / "other", no_dist=True)
    torch.save({"args": 1}, tmp_path / "other" / "common.pt")
    assert weights_hash(tmp_path / "other") != weights_hash(saved)
    item_of(copy, "weight").file.write_bytes(b"")
    assert weights_hash(copy) != weights_hash(saved)


def test_the_hash_of_the_weights_leaves_the_optimizer_out(tmp_path: Path) -> None:
    hashes = set()
    for name, step in (("one", 1.0), ("two", 2.0)):
        state = {"weight": torch.ones(9), "optimizer.state": torch.full((9,), step)}
        dcp.save(state, checkpoint_id=tmp_path / name, no_dist=True)
        hashes.add(weights_hash(tmp_path / name))
    assert len(hashes) == 1
