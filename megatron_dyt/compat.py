"""The only reader of Megatron's version: what is supported, what is tested, and what came when."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dyt.errors import UserError

if TYPE_CHECKING:
    from packaging.version import Version

# First supported release and first unsupported minor.
SUPPORTED = ("0.16.1", "0.20.0")
# The releases that `make test-versions` runs the tests on; the last one is that of constraints.txt.
TESTED = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")

# The minor release from which Megatron has it. Other files ask `has(NAME)` and compare no versions.
SINCE = {
    # core: `get_write_results_queue` without the underscore
    "public_results_queue": "0.17",
    # the wheel holds `megatron.training`
    "training_loop": "0.17",
    # layers take (output, residual) from a norm that returns both
    "sum_from_norm": "0.17",
    # the router of experts runs without Transformer Engine
    "experts_without_te": "0.17",
    # multi-latent attention can be built without Transformer Engine
    "latent_attention_without_te": "0.17",
    # Mamba's stack is called a hybrid stack
    "hybrid_stack": "0.18",
    # `pretrain` takes a container of configurations; arguments are parsed before it is called
    "config_container": "0.18",
    # training: `_async_delete_checkpoint_impl` is a function of the module, which can be replaced
    "deletion_by_name": "0.17",
    # the tokenizer's flags are a dataclass, `TokenizerConfig`
    "tokenizer_config": "0.18",
    # core: `get_batch_on_this_tp_rank` and `get_batch_on_this_cp_rank` take what they need as arguments
    "batch_in_core": "0.18",
    # `mtp_on_this_rank` takes the pipeline layout instead of the config
    "mtp_by_layout": "0.18",
    # --step-batch-size-schedule; --rampup-batch-size is read by nothing any more
    "step_batch_size": "0.18",
    # the model is built from a configuration (`gpt_config_from_args`), without a model provider
    "model_builders": "0.19",
    # --mtp-detach-heads: MTP layers are clipped by a norm of their own
    "detached_mtp": "0.19",
    # --dataloader-inter-document-masking
    "document_masking": "0.19",
}


def megatron_version() -> str:
    """Version of the installed megatron-core, such as "0.19.2".

    Raises:
        UserError: megatron-core is not installed.
    """
    return megatron_build().partition("+")[0]


def megatron_build() -> str:
    """The version, in a checkout of Megatron with its commit: "0.19.2+0123abc".

    Megatron appends the commit of whatever repository its files lie in. Of an installed one that is
    not Megatron's: an environment may be in a repository of the user's, who may commit at any time.

    Raises:
        UserError: megatron-core is not installed.
    """
    try:
        import megatron.core.package_info as package_info
    except ImportError as error:
        raise UserError(
            "megatron-core is not installed (or does not import: "
            f"{error}). Install it with: pip install 'megatron-dyt[train]'."
        ) from error
    version = str(package_info.__version__)
    is_checkout = (Path(package_info.__file__).parents[2] / ".git").exists()
    return version if is_checkout else version.partition("+")[0]


def check_version() -> str:
    """The installed version, if this plugin supports it; UserError with the range otherwise.

    A pre-release counts as the release before it at the lower end ("0.16.1rc0" is too old) and as its
    own release at the upper end ("0.20.0rc0" is too new).
    """
    from packaging.version import Version

    version = megatron_version()
    low, high = SUPPORTED
    parsed = _parse(version)
    if not (Version(low) <= parsed and parsed.release < Version(high).release):
        raise UserError(
            f"megatron-core {version} is not supported: megatron_dyt works with >= {low}, < {high} "
            f"(tested: {', '.join(TESTED)}). Install one of these, for example: "
            f"pip install 'megatron-core[training]=={TESTED[-1]}'."
        )
    return version


def has(feature: str, version: str | None = None) -> bool:
    """Whether Megatron of `version` (default: the installed one) has `feature`, a key of `SINCE`."""
    from packaging.version import Version

    return _parse(version or megatron_version()).release[:2] >= Version(SINCE[feature]).release


def has_training() -> bool:
    """Whether `megatron.training` (the training loop) is there: the wheel has it from 0.17."""
    return importlib.util.find_spec("megatron.training") is not None


def check_training_version() -> None:
    """Raise UserError unless the installed Megatron has a training loop that our entry points know."""
    if not has("training_loop") or not has_training():
        raise UserError(
            f"megatron-core {megatron_version()} is installed, without a training loop that "
            "megatron_dyt knows; python -m megatron_dyt.pretrain and .evaluation need "
            f">= {SINCE['training_loop']}. Install 'megatron-core[training]=={TESTED[-1]}', or run your "
            "own script with python -m megatron_dyt.run."
        )


def hybrid_stack() -> tuple[str, str]:
    """(module, class) of the stack of layers by a pattern: Mamba, attention, MLP, MoE and others."""
    if not has("hybrid_stack"):
        return "megatron.core.ssm.mamba_block", "MambaStack"
    return "megatron.core.models.hybrid.hybrid_block", "HybridStack"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed; without it Megatron puts mocks in its place."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def _parse(version: str) -> Version:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version)
    except InvalidVersion as error:
        raise UserError(
            f"megatron-core calls itself version {version!r}, which is no version; install a release "
            f">= {SUPPORTED[0]}, < {SUPPORTED[1]}."
        ) from error
