"""Two pipeline stages come to one verdict about a bad gradient or alpha that one of them has."""

from pathlib import Path

import pytest

from tests.distributed.plain import launch
from tests.ranks import Parent

pytestmark = pytest.mark.distributed

WORKER = str(Path(__file__).with_name("faulty.py"))
FLAGS = "--normalization DyT --dyt-preset unit --pipeline-model-parallel-size 2 --train-iters 5"


def test_all_ranks_skip_and_all_ranks_stop(tiny_llama: list[str], tmp_path: Path, ranks: Parent) -> None:
    flags = [*tiny_llama, *FLAGS.split(), "--no-check-for-nan-in-loss-and-grad"]
    first, second = launch(ranks, tmp_path, [[WORKER, *flags]] * 2)
    warning = "WARNING: step 2: the gradient is not finite (norm nan) and was not applied. layer 2 attn "
    assert f"{warning}decoder.layers.1.input_layernorm.weight (gradient) on rank 1." in first.out
    assert "number of skipped iterations:   1" in second.out
    fault = (
        "step 3: an update made alpha <= 0 or not finite: layer 1 attn decoder.layers.0.input_layernorm has "
    )
    assert first.code == second.code == 1
    assert first.last_words.startswith(f"megatron_dyt: stopped: {fault}alpha -0.0")
    assert "was 1e-05 on rank 0." in first.last_words
    assert second.last_words == first.last_words.replace("megatron_dyt:", "megatron_dyt [rank 1]:")
