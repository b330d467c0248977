"""vLLM serves an export: its scores are transformers', and so are its greedy tokens.

MEGATRON_DYT_VLLM is the interpreter of an environment with vLLM (docs/serving.md); skipped without.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dyt.config import DyTConfig
from tests.hf.conftest import TOKENS, hf_model

VLLM = os.environ.get("MEGATRON_DYT_VLLM")
NEW = 4
# vLLM's attention on CPUs takes heads of 32 channels and more.
SIZE = {"hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2}

pytestmark = pytest.mark.skipif(VLLM is None, reason="MEGATRON_DYT_VLLM is not set")


@pytest.mark.parametrize(
    ("dyt", "config", "export", "tensor_parallel"),
    [
        pytest.param({}, {}, {}, 1, id="auto"),
        pytest.param({"bias": True}, {"qk_layernorm": True}, {}, 2, id="bias, qk norms, two ranks"),
        pytest.param({}, {}, {"fold_weight": True}, 1, id="folded"),
        pytest.param({"function": "erf"}, {"model": {"tied": True}}, {}, 1, id="erf, tied embeddings"),
    ],
)
def test_scores_and_greedy_tokens_are_those_of_transformers(
    save_gpt: Callable[..., Any],
    tmp_path: Path,
    dyt: dict[str, Any],
    config: dict[str, Any],
    export: dict[str, Any],
    tensor_parallel: int,
) -> None:
    saved = save_gpt(dyt=DyTConfig.preset("auto", 128, **dyt), **SIZE, **config)
    directory = saved.export(tmp_path / "hf", **export)
    prompts = TOKENS[:, : TOKENS.shape[1] - NEW]
    answers = vllm_answers(directory, prompts, tensor_parallel, tmp_path)
    model = hf_model(directory)
    with torch.no_grad():
        greedy = model.generate(
            prompts, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
        )[:, -NEW:]
        scores = model(prompts).logits.log_softmax(-1)[:, :-1].gather(2, prompts[:, 1:, None])[..., 0]
    torch.testing.assert_close(
        torch.tensor([each["scores"] for each in answers]), scores, rtol=1e-4, atol=1e-4
    )
    assert [each["tokens"] for each in answers] == greedy.tolist()


def vllm_answers(directory: Path, prompts: torch.Tensor, ranks: int, place: Path) -> list[dict[str, Any]]:
    """What `vllm_scores.py` finds for each prompt."""
    script = Path(__file__).with_name("vllm_scores.py")
    words = [VLLM, script, directory, ranks, NEW, json.dumps(prompts.tolist()), place / "answers.json"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    answers: list[dict[str, Any]] = json.loads((place / "answers.json").read_text())
    return answers
