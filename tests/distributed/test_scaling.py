"""The count of `benchmarks/scaling.py` is what real steps of two processes hand to their collectives."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import FP32, GUARD_BYTES, Stage, added, aligned
from tests.distributed import cases

pytestmark = pytest.mark.distributed

HIDDEN, LAYERS = 64, 4
COMMON = f"--hidden-size {HIDDEN} --ffn-hidden-size 128 --train-iters 2 --num-layers {LAYERS}"
DIST_OPT = "--use-distributed-optimizer"
# Name: (flags, what `added` is told).
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2_sp": (cases.TP2_SP, {"tp": 2}),
    "tp2": (cases.TP2, {"tp": 2, "sequence_parallel": False}),
    "tp2_qk": (f"{cases.TP2} --qk-layernorm", {"tp": 2, "sequence_parallel": False}),
    "pp2": (cases.PP2, {"pp": 2}),
    "dp2": ("", {"dp": 2, "distributed_optimizer": False}),
    "dp2_distributed_optimizer": (DIST_OPT, {"dp": 2}),
}
BIASED = "tp2_sp"  # With --dyt-bias too.
# The same with more tokens in a step.
LONGER = {"tp2_sp", "dp2"}
MORE = "--seq-length 32 --max-position-embeddings 32 --global-batch-size 8"


def argv(norm: str, flags: str) -> list[str]:
    words = f"{cases.COMMON} {cases.MODELS['dense']} {COMMON} {flags}".split()
    if norm == "DyT":
        return words
    # Started alike, without DyT's flags.
    dropped = {"--dyt-bias", "--no-dyt-bias", "--dyt-preset", "unit"}
    words = [word for word in words if word not in dropped]
    words[words.index("--normalization") + 1] = norm
    return words


def todo() -> list[dict[str, Any]]:
    found = []
    for name, (flags, _) in LAYOUTS.items():
        variants = {"": "--no-dyt-bias"}
        if name in LONGER:
            variants["_longer"] = f"--no-dyt-bias {MORE}"
        if name == BIASED:
            variants["_bias"] = "--dyt-bias"
        for variant, more in variants.items():
            found += [
                {"name": f"count_{norm}_{name}{variant}", "argv": argv(norm, f"{flags} {more}")}
                for norm in ("DyT", "RMSNorm")
            ]
    return found


@pytest.fixture
def counts(launch: Callable[..., None], results: Path) -> Callable[[str, str, int], dict[str, Any]]:
    launch("counts", 2, todo(), worker="counting.py")

    def read(norm: str, name: str, rank: int) -> dict[str, Any]:
        path = results / f"count_{norm}_{name}.{rank}.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert found["calls"]
        return found

    return read


def stage(name: str, rank: int, bias: bool = False) -> Stage:
    split = name.startswith("pp2")
    return Stage(
        LAYERS // 2 if split else LAYERS,
        HIDDEN,
        first=not split or rank == 0,
        last=not split or rank == 1,
        bias=bias,
        qk_norm=name.endswith("qk"),
        head_dim=HIDDEN // 4,
    )


def measured(counts: Callable[..., Any], name: str, rank: int) -> tuple[int, int, int]:
    """(parameters, calls, bytes) that DyT has more than RMSNorm."""
    dyt, rms = (counts(norm, name, rank) for norm in ("DyT", "RMSNorm"))
    more = [
        len(dyt["calls"]) - len(rms["calls"]),
        sum(call[1] for call in dyt["calls"]) - sum(call[1] for call in rms["calls"]),
    ]
    return sum(dyt["parameters"]) - sum(rms["parameters"]), more[0], more[1]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if "optimizer" not in name])
def test_parameters_calls_and_bytes(counts: Callable[..., Any], name: str, rank: int) -> None:
    expected = added(stage(name, rank), **LAYOUTS[name][1])
    assert measured(counts, name, rank) == (expected.parameters, expected.collectives, expected.total)


def test_with_bias(counts: Callable[..., Any]) -> None:
    expected = added(stage(BIASED, 0, bias=True), tp=2)
    assert expected.parameters == (2 * LAYERS + 1) * (1 + HIDDEN) + 1
    found = measured(counts, f"{BIASED}_bias", 0)
    assert found == (expected.parameters, expected.collectives, expected.total)


@pytest.mark.parametrize("name", sorted(LONGER))
def test_longer_sequences_and_larger_batches_add_nothing(counts: Callable[..., Any], name: str) -> None:
    assert measured(counts, f"{name}_longer", 0) == measured(counts, name, 0)
    # They do cost RMSNorm's step something, or nothing would have been compared.
    longer, usual = (counts("RMSNorm", each, 0)["calls"] for each in (f"{name}_longer", name))
    if name == "tp2_sp":
        assert sum(call[1] for call in longer) > sum(call[1] for call in usual)


def test_the_one_call_more_is_the_guards(counts: Callable[..., Any]) -> None:
    dyt, rms = (Counter(map(tuple, counts(norm, "pp2", 0)["calls"])) for norm in ("DyT", "RMSNorm"))
    assert list((dyt - rms).elements()) == [("c10d::allreduce_", GUARD_BYTES, 2)]
    assert not rms - dyt


def test_the_distributed_optimizers_buffer(counts: Callable[..., Any]) -> None:
    """Exactly, with the padding of the buffer's end that `added` leaves out."""
    name = "dp2_distributed_optimizer"
    dyt, rms = (counts(norm, name, 0) for norm in ("DyT", "RMSNorm"))
    expected = added(stage(name, 0), parameter_bytes=FP32, **LAYOUTS[name][1])
    lengths = [sum(map(aligned, run["parameters"])) for run in (dyt, rms)]
    assert (lengths[0] - lengths[1]) * FP32 == expected.reduction == expected.gather
    ends = [math.ceil(length / 128) * 128 for length in lengths]
    more = (ends[0] - ends[1]) * FP32
    assert measured(counts, name, 0) == (expected.parameters, expected.collectives, 2 * more + GUARD_BYTES)
