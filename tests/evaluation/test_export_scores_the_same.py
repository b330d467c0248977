"""A checkpoint here and its export in lm-eval's own `hf` model: the same log-probabilities and tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from megatron_dyt import cli, cpu
from megatron_dyt.evaluation.checkpoint_model import load_model
from megatron_dyt.evaluation.lm import MegatronDyTLM
from megatron_dyt.evaluation.task_loading import load_tasks
from tests.license_tokenizer import TEXT

from .conftest import SEQUENCE, Trained
from .task_data import write_all

PARAGRAPHS = [part for part in TEXT.split("\n\n") if len(part) > 200][:4]


@pytest.fixture(scope="session")
def requests(tmp_path_factory: pytest.TempPathFactory) -> list[Instance]:
    """The requests of two documents of each of the paper's tasks."""
    data = tmp_path_factory.mktemp("data")
    write_all(data, 2)
    found = []
    for task in load_tasks(["dyt_paper"], data=data)["tasks"].values():
        task.build_all_requests(rank=0, world_size=1)
        found += task.instances
    return found


def whole_texts() -> list[Instance]:
    texts = enumerate(PARAGRAPHS)
    return [Instance("loglikelihood_rolling", {}, (text,), i, metadata=("task", i, 1)) for i, text in texts]


@pytest.mark.parametrize(("norm", "bos"), [("RMSNorm", False), ("DyT", True)])
def test_same_as_the_export_in_lm_eval_s_hf(
    trained: Callable[..., Trained],
    requests: list[Instance],
    fresh_megatron: None,
    tmp_path: Path,
    norm: str,
    bos: bool,
) -> None:
    saved = trained(norm, unusual="--rotary-base 500")
    lm = MegatronDyTLM.of(load_model(str(saved.directory), bos=bos), batch_tokens=400)
    assert lm.scorer.share
    ours = lm.loglikelihood(requests)
    rolling = lm.loglikelihood_rolling(whole_texts())
    prompts = [lm.tok_encode(text)[-40:] for text in PARAGRAPHS]
    done = lambda new: len(new) == 8  # noqa: E731
    tokens = lm.generator.generate(prompts, max_new=8, max_length=SEQUENCE, done=done)

    output = tmp_path / "export"
    words = [
        "export",
        "--load",
        str(saved.directory),
        "--output",
        str(output),
        "--bos" if bos else "--no-bos",
    ]
    cli.main.main(words, standalone_mode=False)
    cpu.disable()  # Under it transformers cannot load a model.
    theirs = hf(output, add_bos_token=True)
    for one, other in zip(ours, theirs.loglikelihood(requests), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]
    for prompt, new in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt])
        both = theirs.model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=[], pad_token_id=0)
        assert both[0].tolist() == prompt + new
    # By itself, lm-eval scores the BOS of a whole text as well, after the BOS that it puts there.
    for plain in [hf(output, add_bos_token=False), *([] if bos else [hf(output)])]:
        expected = plain.loglikelihood_rolling(whole_texts())
        assert rolling == pytest.approx(expected, abs=1e-3)
    assert len({round(one[0], 3) for one in ours}) > len(ours) / 2


def hf(directory: Path, **flags: bool) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(directory),
        trust_remote_code=True,
        dtype=torch.float32,
        device="cpu",
        batch_size=8,
        **flags,
    )
