"""The dataset's class and configuration follow Megatron's arguments."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dyt.training import datasets
from tests.megatron_args import arguments


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({}, "GPTDataset"),
        ({"mock_data": True}, "MockGPTDataset"),
        ({"fim_data": True}, "GPTFIMDataset"),
        ({"sft": True, "mock_data": True}, "SFTDataset"),
    ],
)
def test_class(flags: dict[str, bool], name: str) -> None:
    args = SimpleNamespace(**{"sft": False, "mock_data": False, "fim_data": False, **flags})
    assert datasets._dataset_class(args).__name__ == name


@pytest.mark.parametrize(
    ("tp_rank", "end_stage", "sft", "mtp", "reads"),
    [
        (0, True, False, False, True),
        (1, True, False, False, False),
        (0, False, False, False, False),
        (0, False, True, False, True),
        (0, False, False, True, True),
    ],
)
def test_which_ranks_read_data(
    monkeypatch: pytest.MonkeyPatch, tp_rank: int, end_stage: bool, sft: bool, mtp: bool, reads: bool
) -> None:
    from megatron.core import mpu
    from megatron.training import arguments as megatron
    from megatron.training import utils

    monkeypatch.setattr(mpu, "get_tensor_model_parallel_rank", lambda: tp_rank)
    monkeypatch.setattr(utils, "is_first_or_last_pipeline_stage", lambda _stage: end_stage)
    monkeypatch.setattr(megatron, "core_transformer_config_from_args", lambda _args: None)
    monkeypatch.setattr(datasets, "mtp_on_this_rank", lambda _config, _stage: mtp)
    assert datasets._reads_data(SimpleNamespace(sft=sft), None) is reads


def args_of_data(tmp_path: Path, **given: Any) -> Namespace:
    counts = tmp_path / "sequences.json"
    counts.write_text(json.dumps({"corpus": 4}))
    sizes = {"seed": 7, "seq_length": 16, "tensor_model_parallel_size": 4, "sequence_parallel": True}
    data = {"data_path": ["corpus"], "split": "99,1,0", "per_dataset_sequences_path": str(counts)}
    tokenizer = {"tokenizer_type": "NullTokenizer", "vocab_size": 100, "data_parallel_size": 1, "rank": 0}
    return arguments(**sizes, **data, **tokenizer, **given)


def test_config(tmp_path: Path) -> None:
    config = datasets.config(args_of_data(tmp_path))
    assert type(config).__name__ == "GPTDatasetConfig"
    assert (config.random_seed, config.sequence_length) == (7, 16)
    assert config.blend == (["corpus"], None)
    assert config.sequences_per_dataset == {"corpus": 4}
    assert config.sequence_parallel_size == 4
    assert config.tokenizer.vocab_size == 100


def test_fill_in_the_middle(tmp_path: Path) -> None:
    parts = {f"fim_{part}_token": part for part in ("prefix", "middle", "suffix", "pad", "eod")}
    rates = {"fim_rate": 0.3, "fim_spm_rate": 0.4, "fim_split_sample": None}
    rest = {"fim_fragment_rate": None, "fim_no_prefix": None, "fim_data": True}
    config = datasets.config(args_of_data(tmp_path, **parts, **rates, **rest))
    assert type(config).__name__ == "GPTFIMDatasetConfig"
    assert (config.fim_rate, config.fim_spm_rate) == (0.3, 0.4)
    assert config.fim_extra_tokens["middle"] == "middle"
