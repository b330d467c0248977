"""The datasets of a GPT run, from Megatron's arguments."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from megatron_dyt import compat

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.transformer import TransformerConfig


def build(samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """The training, validation and test datasets with (at least) the given numbers of samples."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.training import get_args, print_rank_0

    args = get_args()
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    builder = BlendedMegatronDatasetBuilder(
        _dataset_class(args),
        samples,
        functools.partial(_reads_data, args, vp_stage),
        config(args),
    )
    datasets = builder.build()
    print_rank_0("> finished creating GPT datasets ...")
    return datasets


# Every rank calls the provider; `_reads_data` says which of them build something.
build.is_distributed = True  # type: ignore[attr-defined]


def _dataset_class(args: Any) -> type:
    if args.sft:
        from megatron.training.datasets.sft_dataset import SFTDataset

        return SFTDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset

    if args.mock_data:
        return MockGPTDataset
    if args.fim_data:
        from megatron.training.datasets.fim_dataset import GPTFIMDataset

        return GPTFIMDataset
    return GPTDataset


def _reads_data(args: Any, vp_stage: int | None) -> bool:
    from megatron.core import mpu
    from megatron.training.arguments import core_transformer_config_from_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    if args.sft or is_first_or_last_pipeline_stage(vp_stage):
        return True
    return mtp_on_this_rank(core_transformer_config_from_args(args), vp_stage)


def config(args: Any) -> GPTDatasetConfig:
    """The dataset's configuration from Megatron's arguments (fill-in-the-middle included)."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path, encoding="utf-8") as file:
            sequences_per_dataset = json.load(file)
    options = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "tokenizer": build_tokenizer(args),
        "path_to_cache": args.data_cache_path,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "sequences_per_dataset": sequences_per_dataset,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        **{name: getattr(args, name) for name in _SAME_NAME_IN_DATASET_CONFIG},
    }
    if compat.has("document_masking"):
        options["inter_document_masking"] = args.dataloader_inter_document_masking
    if args.fim_data:
        return _fim_config(args, options)
    return GPTDatasetConfig(**options)


_SAME_NAME_IN_DATASET_CONFIG = (
    *("split", "multiple_validation_sets", "full_validation", "num_dataset_builder_threads"),
    *("mmap_bin_files", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    *("object_storage_cache_path", "mid_level_dataset_surplus", "allow_ambiguous_pad_tokens"),
    *("context_parallel_size", "data_parallel_size", "hybrid_context_parallel"),
)


def _fim_config(args: Any, options: dict[str, Any]) -> GPTDatasetConfig:
    from megatron.training.datasets.fim_dataset import GPTFIMDatasetConfig

    parts = ("prefix", "middle", "suffix", "pad", "eod")
    names = ("rate", "spm_rate", "split_sample", "fragment_rate", "no_prefix")
    return GPTFIMDatasetConfig(
        **options,
        fim_extra_tokens={part: getattr(args, f"fim_{part}_token") for part in parts},
        **{f"fim_{name}": getattr(args, f"fim_{name}") for name in names},
    )


def mtp_on_this_rank(config: TransformerConfig, vp_stage: int | None) -> bool:
    """Whether this rank holds multi-token prediction layers, which read tokens too."""
    from megatron.core.transformer import multi_token_prediction as mtp

    place: dict[str, Any] = {"config": config}
    if compat.has("mtp_by_layout"):
        place = {
            "layout": config.pipeline_model_parallel_layout,
            "mtp_num_layers": config.mtp_num_layers,
        }
    return mtp.mtp_on_this_rank(**place, ignore_virtual=False, vp_stage=vp_stage)
