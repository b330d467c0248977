"""Which layouts the state of an optimizer is refused for; tests/distributed shows what loads into which."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt.checkpoints import optimizer_layout
from megatron_dyt.errors import UserError
from tests.megatron_args import arguments

DEFAULT, ANY = "dp_reshardable", "fully_reshardable"
WHERE = Path("run/iter_0000100")

LAYOUT: dict[str, Any] = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 4,
    "num_layers": 32,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "world_size": 64,
}
PLAIN = {"use_distributed_optimizer": False}
EXPERTS = {"expert_model_parallel_size": 8}


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is said when a checkpoint saved by one layout is loaded by another, or None."""

    def check(saved: dict[str, Any], kind: str | None, now: dict[str, Any], **buffers: int) -> Any:
        monkeypatch.setattr(optimizer_layout, "_saved", lambda path: (arguments(**LAYOUT | saved), kind))
        stored = Counter(buffers or {"large": 10**9})
        monkeypatch.setattr(optimizer_layout, "_buffers", lambda path: +stored)
        try:
            optimizer_layout.refuse_other(arguments(**LAYOUT | now), WHERE)
        except UserError as error:
            return str(error)
        return None

    return check


OTHERS = [
    ({"tensor_model_parallel_size": 4}, "--tensor-model-parallel-size 4 (saved: 2)"),
    ({"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size 2 (saved: 4)"),
    (
        {"num_virtual_stages_per_pipeline_rank": 2},
        "--num-virtual-stages-per-pipeline-rank 2 (saved: 1)",
    ),
    (
        {"pipeline_model_parallel_layout": "Et*8|t*24L"},
        "--pipeline-model-parallel-layout Et*8|t*24L (saved: None)",
    ),
    ({"decoder_first_pipeline_num_layers": 5}, "--decoder-first-pipeline-num-layers 5 (saved: None)"),
    ({"ddp_bucket_size": 50_000_000}, "--ddp-bucket-size 50000000 (saved: 40000000)"),
    ({"world_size": 800}, "--ddp-bucket-size 100000000 (saved: 40000000)"),
    (
        {"overlap_grad_reduce": False},
        "--ddp-bucket-size infinite, without --overlap-grad-reduce (saved: 40000000)",
    ),
]


@pytest.mark.parametrize(("now", "named"), OTHERS, ids=[named for _, named in OTHERS])
def test_the_default_format_is_for_another_number_of_data_parallel_ranks_alone(
    refusal: Any, now: dict[str, Any], named: str
) -> None:
    said = refusal({}, DEFAULT, now)
    assert named in said
    assert str(WHERE) in said
    assert "--dist-ckpt-optim-fully-reshardable" in said
    assert "--no-load-optim" in said
    assert refusal({}, ANY, now) is None


@pytest.mark.parametrize("now", [now for now, _ in OTHERS])
def test_without_the_distributed_optimizer_any_layout_loads(refusal: Any, now: dict[str, Any]) -> None:
    assert refusal(PLAIN, None, PLAIN | now) is None


def test_the_distributed_optimizer_and_others_have_formats_of_their_own(refusal: Any) -> None:
    assert "saved without --use-distributed-optimizer" in refusal(PLAIN, None, {})
    for kind in (DEFAULT, ANY):
        assert "saved with --use-distributed-optimizer" in refusal({}, kind, PLAIN)


@pytest.mark.parametrize(
    ("saved", "now"),
    [
        ({}, {}),
        ({}, {"world_size": 128}),
        ({}, {"world_size": 320}),  # 40 data parallel ranks: the last with the smallest bucket.
        ({"num_virtual_stages_per_pipeline_rank": 4}, {"num_layers_per_virtual_pipeline_stage": 2}),
        ({"world_size": 800}, {"ddp_bucket_size": 100_000_000}),
        ({}, {"tensor_model_parallel_size": 8, "no_load_optim": True}),
        ({}, {"tensor_model_parallel_size": 8, "finetune": True}),
        ({}, {"tensor_model_parallel_size": 8, "use_mp_args_from_checkpoint_args": True}),
        ({}, {"tensor_model_parallel_size": 8, "skip_train": True}),
        # As with --use-checkpoint-args.
        (
            {"num_virtual_stages_per_pipeline_rank": 4},
            {"num_layers": None, "num_layers_per_virtual_pipeline_stage": 2},
        ),
        ({"no_save_optim": True}, {"tensor_model_parallel_size": 8}),
        (EXPERTS, EXPERTS | {"world_size": 128}),
    ],
)
def test_what_loads_is_not_refused(refusal: Any, saved: dict[str, Any], now: dict[str, Any]) -> None:
    assert refusal(saved, DEFAULT, now) is None


def test_the_size_of_buckets_does_not_matter_where_a_buffer_is_one(refusal: Any) -> None:
    assert refusal({}, DEFAULT, {"world_size": 800}, small=39_999_999) is None
    assert refusal({}, DEFAULT, {"world_size": 800}, small=1, large=40_000_000) is not None


def test_an_optimizer_without_buckets_loads_into_any_layout(refusal: Any) -> None:
    assert refusal({}, DEFAULT, {"tensor_model_parallel_size": 4}, none=0) is None


@pytest.mark.parametrize("kind", [DEFAULT, ANY, None])
@pytest.mark.parametrize(("saved", "now"), [(EXPERTS, {}), ({}, EXPERTS)])
def test_experts_have_an_optimizer_of_their_own_or_not_in_every_format(
    refusal: Any, kind: str | None, saved: dict[str, Any], now: dict[str, Any]
) -> None:
    then = saved.get("expert_model_parallel_size", 1)
    assert f"was saved with --expert-model-parallel-size {then}, and" in refusal(saved, kind, now)


def test_expert_parallel_sizes_above_one_need_the_other_format(refusal: Any) -> None:
    fewer = {"expert_model_parallel_size": 4}
    assert "--expert-model-parallel-size 4 (saved: 8)" in refusal(EXPERTS, DEFAULT, fewer)
    assert refusal(EXPERTS, ANY, fewer) is None


def test_what_is_not_there_or_not_readable_is_not_judged(tmp_path: Path) -> None:
    optimizer_layout.refuse_other(arguments(**LAYOUT), tmp_path / "iter_0000001")
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / "metadata.json").write_text("{")
    optimizer_layout.refuse_other(arguments(**LAYOUT), tmp_path / "iter_0000002")
