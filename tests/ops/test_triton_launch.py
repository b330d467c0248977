"""The launch table's arithmetic: every element is covered, every program has work."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dyt.errors import UserError
from megatron_dyt.ops import triton_launch as launch
from megatron_dyt.ops.triton_launch import PLANS, Chip

CHIPS = [Chip(family, 132, 64 if family == "gfx9" else 32, family != "gfx9") for family, _ in PLANS]
HIDDEN = (1, 7, 64, 100, 128, 768, 1000, 1536, 4096, 5000, 5120, 8192, 11008, 16384, 50257)
ROWS = (1, 3, 100, 4096, 2**20)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_tiles(hidden: int, itemsize: int) -> None:
    for chip in CHIPS:
        plan = PLANS[chip.family, itemsize]
        threads = plan.warps * chip.warp_size
        for rows in ROWS:
            forward = launch.forward_tile(chip, rows, hidden, itemsize)
            tiles = launch.ceil_div(hidden, forward.block_n)
            programs = launch.ceil_div(rows, forward.block_m) * tiles
            full = threads * plan.forward * 16 // itemsize
            assert forward.unroll * forward.block_m * forward.block_n <= full
            # A smaller tile than the full one only where there are too few programs.
            if forward.block_m * forward.block_n < full:
                twice = launch.ceil_div(rows, 2 * forward.block_m) * tiles
                assert twice < 4 * chip.processors <= 2 * max(programs, 2 * chip.processors)
        for unit in (1, 8, 16):
            tile = launch.backward_tile(chip, hidden, itemsize, unit, "tanh")
            # One 16-byte access a thread, for each of the unrolled slices.
            assert tile.block_m * tile.block_n == threads * 16 // itemsize
            assert tile.unroll == (plan.tanh if unit * itemsize >= 16 else 1)
        for block_n in (forward.block_n, tile.block_n):
            assert block_n & (block_n - 1) == 0
            padded = launch.ceil_div(hidden, block_n) * block_n
            assert padded < 2 * hidden
            if hidden > 1024:
                assert padded <= 1.05 * hidden


@pytest.mark.parametrize("hidden", HIDDEN)
def test_row_programs_all_have_rows_and_run_at_once(hidden: int) -> None:
    for chip in CHIPS:
        tile = launch.backward_tile(chip, hidden, 2, 16, "tanh")
        tiles = launch.ceil_div(hidden, tile.block_n)
        places = PLANS[chip.family, 2].resident * chip.processors
        for rows in ROWS:
            programs = launch.row_programs(chip, tile, rows, hidden, 2)
            assert 1 <= programs <= launch.ceil_div(rows, tile.rows)
            assert programs == 1 or rows / programs >= 16
            assert programs == 1 or programs * tiles <= places
        assert programs * tiles > places - tiles or programs == 1 or tile.rows * programs >= rows


CUDA_FAMILIES = {7: "sm80", 8: "sm80", 9: "sm90", 10: "sm100", 12: "sm100"}


@pytest.mark.parametrize(
    ("hip", "major", "warp_size", "family"),
    [*((None, major, 32, family) for major, family in CUDA_FAMILIES.items()), ("6.4", 9, 64, "gfx9")],
)
def test_chip_of_a_device(
    hip: str | None, major: int, warp_size: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(major=major, multi_processor_count=99, warp_size=warp_size)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    launch.chip_of.cache_clear()
    assert launch.chip_of(torch.device("cuda", 0)) == Chip(family, 99, warp_size, ptx=hip is None)
    launch.chip_of.cache_clear()


def test_chip_of_the_interpreter() -> None:
    assert launch.chip_of(torch.device("cpu")) == launch.INTERPRETER


def test_a_measured_table_replaces_its_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = PLANS["sm90", 2]._replace(forward=2)
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"sm90": {"2": row._asdict()}}))
    monkeypatch.setenv("MEGATRON_DYT_LAUNCH_TABLE", str(path))
    assert runpy.run_path(launch.__file__)["PLANS"] == PLANS | {("sm90", 2): row}


@pytest.mark.parametrize("text", ["", "[]", '{"sm90": {"2": {"warps": 4}}}', '{"sm90": {"x": {}}}'])
def test_a_file_that_is_no_table_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"table.json is no launch table .*tune.py writes one"):
        launch.read_table(path)
