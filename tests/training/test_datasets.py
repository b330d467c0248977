"""The dataset's class and configuration follow Megatron's arguments."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dyt.training import datasets


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
    from megatron.training import arguments, utils

    monkeypatch.setattr(mpu, "get_tensor_model_parallel_rank", lambda: tp_rank)
    monkeypatch.setattr(utils, "is_first_or_last_pipeline_stage", lambda _stage: end_stage)
    monkeypatch.setattr(arguments, "core_transformer_config_from_args", lambda _args: None)
    monkeypatch.setattr(datasets, "mtp_on_this_rank", lambda _config, _stage: mtp)
    assert datasets._reads_data(SimpleNamespace(sft=sft), None) is reads


def arguments(tmp_path: Path, **given: Any) -> SimpleNamespace:
    counts = tmp_path / "sequences.json"
    counts.write_text(json.dumps({"corpus": 4}))
    names = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    flags = dict.fromkeys((*names, "per_split_data_args_path", *datasets._SAME_NAME_IN_DATASET_CONFIG))
    values: dict[str, Any] = {
        "seed": 7,
        "seq_length": 16,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": 100,
        "pad_vocab_size": False,
        "null_tokenizer_eod_id": None,
        "null_tokenizer_pad_id": None,
        "data_cache_path": None,
        "create_attention_mask_in_dataloader": False,
        "dataloader_fast_cache_load": False,
        "dataloader_defer_npy_index_mmap": False,
        "dataloader_inter_document_masking": False,
        "per_dataset_sequences_path": str(counts),
        "tensor_model_parallel_size": 4,
        "sequence_parallel": True,
        "split": "99,1,0",
        "data_path": ["corpus"],
        "fim_data": False,
        "num_dataset_builder_threads": 1,
        "mid_level_dataset_surplus": 0.005,
        **dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False),
    }
    return SimpleNamespace(**{**flags, **values, **given})


def test_config(tmp_path: Path) -> None:
    config = datasets.config(arguments(tmp_path))
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
    config = datasets.config(arguments(tmp_path, **parts, **rates, **rest))
    assert type(config).__name__ == "GPTFIMDatasetConfig"
    assert (config.fim_rate, config.fim_spm_rate) == (0.3, 0.4)
    assert config.fim_extra_tokens["middle"] == "middle"
