"""What is wrong on one rank is a clear error on every rank, and nobody waits forever."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_LLAMA
from tests.distributed.plain import launch
from tests.ports import free_port
from tests.ranks import TIMEOUT, Parent

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).with_name("disagreeing.py"))
DYT = [*TINY_LLAMA.split(), "--normalization", "DyT", "--dyt-preset", "unit"]
# Nobody is missing, however long the machine takes.
LONG = TIMEOUT / 2
# Somebody is.
SHORT = 4.0


def rank(*flags: str, version: str = "1.0", plugin: bool = True) -> dict[str, Any]:
    argv = [word for word in DYT if word != "--mock-data" or "--data-path" not in flags]
    return {"argv": [*argv, *flags], "version": version, "plugin": plugin}


CASES: dict[str, tuple[float, dict[str, Any], dict[str, Any]]] = {
    "settings and versions differ": (LONG, rank(), rank("--dyt-alpha-init-attn", "0.3", version="1.1")),
    "one rank's flags are refused": (LONG, rank(), rank("--apply-layernorm-1p")),
    "rank 0's flags are refused": (LONG, rank("--apply-layernorm-1p"), rank()),
    "all ranks' flags are refused": (LONG, rank("--apply-layernorm-1p"), rank("--apply-layernorm-1p")),
    "a file is missing": (LONG, rank("--data-path", "nowhere"), rank("--data-path", "nowhere")),
    "another norm": (SHORT, rank(), rank("--normalization", "LayerNorm", "--exit-interval", "1")),
    "no plugin on rank 1": (SHORT, rank(), rank(plugin=False)),
    "no plugin on rank 0": (SHORT, rank(plugin=False), rank()),
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory, ranks: Parent) -> dict[str, list[list[str]]]:
    """For each case [exception, message] of both ranks."""
    directory = tmp_path_factory.mktemp("handshake")
    todo = [{"port": free_port(), "seconds": seconds, "ranks": both} for seconds, *both in CASES.values()]
    (directory / "cases.json").write_text(json.dumps(todo), encoding="utf-8")
    ended = launch(ranks, directory, [[WORKER, str(directory / "cases.json")]] * 2)
    results = [[json.loads(line) for line in re.findall("RESULT (.*)", each.out)] for each in ended]
    assert [len(each) for each in results] == [len(CASES)] * 2, ended
    return dict(zip(CASES, map(list, zip(*results, strict=True)), strict=True))


def test_different_settings_and_versions(endings: dict[str, list[list[str]]]) -> None:
    (kind, message), other = endings["settings and versions differ"]
    assert other == [kind, message]
    assert kind == "UserError"
    assert message.startswith("the ranks differ: --dyt-alpha-init-attn is 0.5 on rank 0 (")
    assert "), 0.3 on rank 1 (" in message
    assert re.search(
        r"megatron_dyt is 1\.0 \(code \w{8}\) on rank 0 .*, 1\.1 \(code \w{8}\) on rank 1 ", message
    )


@pytest.mark.parametrize(
    ("case", "bad"), [("one rank's flags are refused", 1), ("rank 0's flags are refused", 0)]
)
def test_flags_refused_on_one_rank(endings: dict[str, list[list[str]]], case: str, bad: int) -> None:
    own, heard = endings[case][bad], endings[case][1 - bad]
    assert own[0] == heard[0] == "UserError"
    assert own[1].startswith("--normalization DyT cannot be combined with layernorm_zero_centered_gamma")
    assert own[1] in heard[1]
    assert heard[1].startswith(f"rank {bad}")


def test_flags_refused_on_all_ranks(endings: dict[str, list[list[str]]]) -> None:
    first, second = endings["all ranks' flags are refused"]
    assert first == second
    assert first[1].startswith("--normalization DyT cannot be combined with layernorm_zero_centered_gamma")


def test_a_missing_file_that_rank_0_finds(endings: dict[str, list[list[str]]]) -> None:
    first, second = endings["a file is missing"]
    assert second[0] == first[0] == "UserError"
    assert second[1] == f"{first[1]} (on {socket.gethostname()}, rank 0)"
    assert first[1].startswith("dataset nowhere: nowhere.idx does not exist")


def test_a_rank_with_another_norm(endings: dict[str, list[list[str]]]) -> None:
    first, _ = endings["another norm"]
    assert first[0] == "TrainingFault"
    assert first[1].startswith("rank 1 of 2 did not answer within 4 s. Such a rank runs without megatron_dyt")


def test_rank_0_without_the_plugin(endings: dict[str, list[list[str]]]) -> None:
    first, second = endings["no plugin on rank 0"]
    assert first == ["SystemExit", "2"]
    assert second[0] == "TrainingFault"
    assert re.match(r"rank 1 found no rank 0 at MASTER_ADDR:MASTER_PORT = 127.0.0.1:\d+ in 4 s", second[1])


def test_a_rank_without_the_plugin(endings: dict[str, list[list[str]]]) -> None:
    first, second = endings["no plugin on rank 1"]
    assert first[0] == "TrainingFault"
    assert first[1].startswith("rank 1 of 2 did not answer within 4 s. Such a rank runs without megatron_dyt")
    # Megatron's parser: invalid choice 'DyT'.
    assert second == ["SystemExit", "2"]
