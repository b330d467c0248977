"""What Megatron's layers need on a GPU and not on a CPU, where the CPU runtime sets other flags.

Megatron finds out when it builds the model, or at the first step: after the wait in a queue.
"""

import importlib
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from megatron_dyt.errors import UserError

# Of apex: adds a weight's gradient up in its matrix product.
FUSION = "fused_weight_gradient_mlp_cuda"


class Need(NamedTuple):
    """What flags take: `wanted(args)` says whether they are on, `there()` whether it is there."""

    what: str
    why: str
    todo: str
    wanted: Callable[[Namespace], bool]
    there: Callable[[], bool]


def _installed(package: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(package) is not None


def _imports(extension: str) -> Callable[[], bool]:
    """Whether a compiled module imports. Looking for it is not enough: it may be for another torch."""

    def try_it() -> bool:
        try:
            importlib.import_module(extension)
        except ImportError:
            return False
        return True

    return try_it


def _local(args: Namespace) -> bool:
    return bool(args.transformer_impl == "local")


def _local_rmsnorm(args: Namespace) -> bool:
    return _local(args) and args.normalization == "RMSNorm"


NEEDS = (
    Need(
        "--transformer-impl transformer_engine (the default)",
        "Transformer Engine is not installed",
        "Install it (docs/integration.md), or give --transformer-impl local.",
        lambda args: bool(args.transformer_impl == "transformer_engine"),
        _installed("transformer_engine"),
    ),
    # With Transformer Engine's layers too: the output layer is Megatron's own.
    Need(
        "gradient accumulation fusion (the default)",
        f"apex's extension {FUSION} does not import",
        "Give --no-gradient-accumulation-fusion, or build apex from source (PyPI's apex is something else).",
        lambda args: bool(args.gradient_accumulation_fusion),
        _imports(FUSION),
    ),
    Need(
        "RoPE fusion (the default)",
        "its kernels are Transformer Engine's, which is not installed",
        "Give --no-rope-fusion.",
        lambda args: bool(
            args.apply_rope_fusion
            and not args.multi_latent_attention
            and (args.position_embedding_type == "rope" or args.use_rotary_position_embeddings)
        ),
        _installed("transformer_engine"),
    ),
    Need(
        "masked softmax fusion (the default) in local attention",
        "the extension scaled_masked_softmax_cuda does not import",
        "Give --no-masked-softmax-fusion.",
        lambda args: bool(_local(args) and args.masked_softmax_fusion and (args.bf16 or args.fp16)),
        _imports("scaled_masked_softmax_cuda"),
    ),
    Need(
        "a persistent norm kernel (the default) with --transformer-impl local",
        "local RMSNorm is PyTorch's, for which Megatron refuses it",
        "Give --no-persist-layer-norm.",
        lambda args: _local_rmsnorm(args) and not args.no_persist_layer_norm,
        lambda: False,
    ),
    Need(
        "--sequence-parallel with --transformer-impl local",
        "local RMSNorm is PyTorch's, for which Megatron refuses it",
        "Use Transformer Engine, or leave --sequence-parallel out.",
        lambda args: _local_rmsnorm(args) and args.sequence_parallel,
        lambda: False,
    ),
)


def fusion_flags() -> list[str]:
    """Flags for what is made up here and not by a user: without apex no gradient accumulation fusion."""
    return [] if _imports(FUSION)() else ["--no-gradient-accumulation-fusion"]


def missing(args: Namespace) -> list[str]:
    """A line for each thing that the flags need on a GPU and that is not here.

    args: Megatron's, parsed and not yet validated.
    """
    return [
        f"{need.what}: {need.why}. {need.todo}" for need in NEEDS if need.wanted(args) and not need.there()
    ]


def check(args: Namespace) -> None:
    """Raise `UserError` when the model could not be built, or not trained, on this machine's GPUs."""
    found = missing(args)
    if found:
        raise UserError(
            f"this Python ({sys.executable}) cannot train on GPUs with these flags. {' '.join(found)}"
        )
