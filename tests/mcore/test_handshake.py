"""What ranks compare, and how a difference is said."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_dyt.mcore import handshake
from megatron_dyt.mcore.handshake import differences, identity
from megatron_dyt.version import __version__


def texts(*changes: dict[str, str]) -> dict[int, str]:
    same = {"--dyt-preset": "unit", "megatron_dyt": "1.0 (code aa)", "host": "n0"}
    return {rank: json.dumps(same | change) for rank, change in enumerate(changes)}


def test_equal_ranks_may_be_on_different_hosts() -> None:
    assert differences(texts({}, {"host": "n1"})) == ""


def test_each_difference_is_named_with_ranks_and_hosts() -> None:
    other = {"--dyt-preset": "paper", "host": "n7"}
    found = differences(texts({}, other, {}, other | {"megatron_dyt": "1.0 (code bb)"}))
    assert found == (
        "the ranks differ: --dyt-preset is unit on ranks 0, 2 (n0), paper on ranks 1, 3 (n7); megatron_dyt "
        "is 1.0 (code aa) on ranks 0, 1, 2 (n0), 1.0 (code bb) on rank 3 (n7). Give all of them the same "
        "flags and installation."
    )


def test_a_setting_that_one_rank_lacks_is_a_difference() -> None:
    found = differences(texts({}, {"--dyt-new": "1"}))
    assert "--dyt-new is not there on rank 0 (n0), 1 on rank 1 (n0)." in found


def test_a_rank_that_stopped_is_quoted() -> None:
    stopped = {0: texts({})[0], 1: json.dumps({"error": "--hidden-size is missing"})}
    assert differences(stopped) == "rank 1 stopped: --hidden-size is missing"


def test_identity_has_all_dyt_settings_and_versions() -> None:
    args = Namespace(normalization="DyT", dyt_preset="unit", dyt_anything=3, embedding_scale="unit", lr=1.0)
    found = identity(args)
    assert found["--dyt-anything"] == "3"
    assert found["--normalization"] == "DyT"
    assert "--lr" not in found
    assert found["megatron_dyt"].startswith(f"{__version__} (code ")
    assert {"megatron-core", "torch", "host"} <= found.keys()


def test_the_digest_is_that_of_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mcore").mkdir()
    (tmp_path / "a.py").write_text("x = 1")
    monkeypatch.setattr(handshake, "__file__", str(tmp_path / "mcore" / "handshake.py"))
    digests = []
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", ""), ("notes.txt", "no source")):
        (tmp_path / name).write_text(text)
        handshake.code_digest.cache_clear()
        digests.append(handshake.code_digest())
    handshake.code_digest.cache_clear()
    assert len(set(digests)) == 3
    assert digests[3] == digests[2]


@pytest.mark.parametrize(
    "args",
    [
        Namespace(normalization="RMSNorm"),
        Namespace(normalization="DyT", fake_process_group=True),
        Namespace(normalization="DyT", inprocess_restart=True),
    ],
)
def test_who_need_not_compare(args: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "Exchange", lambda *_: pytest.fail("no exchange"))
    handshake.compare_ranks(args)
    handshake.leave(args, ValueError("x"))


def test_nobody_compares_in_a_world_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "Exchange", lambda *_: pytest.fail("no exchange"))
    with handshake.suspended(), handshake.suspended():
        handshake.compare_ranks(Namespace(normalization="DyT"))
    monkeypatch.setattr(handshake, "Exchange", lambda *_: Namespace(world=1))
    handshake.compare_ranks(Namespace(normalization="DyT"))
