"""The only reader of Megatron's version."""

from __future__ import annotations

import importlib.util

from megatron_dyt.errors import UserError

# First supported release and first unsupported minor.
SUPPORTED = ((0, 16, 1), (0, 20, 0))
# First release whose `megatron.training` has the configuration containers that the entry points use.
TRAINING_FROM = (0, 19, 0)
# First release whose layers take (output, residual) from a norm.
SUM_FROM_NORM_FROM = (0, 17, 0)
# First release in which Mamba's stack is called a hybrid stack.
HYBRID_FROM = (0, 18, 0)


def megatron_version() -> str:
    """Version of the installed megatron-core, such as "0.19.2".

    Raises:
        UserError: megatron-core is not installed.
    """
    return megatron_build().partition("+")[0]


def megatron_build() -> str:
    """The version with what Megatron appends inside a git repository, its commit: "0.19.2+0123abc".

    Raises:
        UserError: megatron-core is not installed.
    """
    try:
        from megatron.core.package_info import __version__
    except ImportError as error:
        raise UserError(
            "megatron-core is not installed (or does not import: "
            f"{error}). Install it with: pip install 'megatron-dyt[train]'."
        ) from error
    return str(__version__)


def check_version() -> str:
    """The installed version, if this plugin supports it; UserError with the range otherwise."""
    version = megatron_version()
    low, high = SUPPORTED
    if not low <= _parse(version) < high:
        raise UserError(
            f"megatron-core {version} is not supported: megatron_dyt works with "
            f">= {_text(low)}, < {_text(high)}. Install one of these, for example: "
            "pip install 'megatron-core[training]==0.19.2'."
        )
    return version


def has_training() -> bool:
    """Whether `megatron.training` (the training loop) is there: the wheel has it from 0.17."""
    return importlib.util.find_spec("megatron.training") is not None


def check_training_version() -> None:
    """Raise UserError unless the installed training loop is one that our entry points are written for."""
    version = megatron_version()
    if _parse(version) < TRAINING_FROM:
        raise UserError(
            f"megatron-core {version} is installed; python -m megatron_dyt.pretrain and .evaluation need "
            f">= {_text(TRAINING_FROM)} with its training loop. Install 'megatron-core[training]==0.19.2', "
            "or run your own script with python -m megatron_dyt.run."
        )


def hybrid_stack() -> tuple[str, str]:
    """(module, class) of the stack of layers by a pattern: Mamba, attention, MLP, MoE and others."""
    if _parse(megatron_version()) < HYBRID_FROM:
        return "megatron.core.ssm.mamba_block", "MambaStack"
    return "megatron.core.models.hybrid.hybrid_block", "HybridStack"


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed; without it Megatron puts mocks in its place."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def takes_sum_from_norm() -> bool:
    """Whether transformer layers take (output, residual) from a norm that returns both."""
    return _parse(megatron_version()) >= SUM_FROM_NORM_FROM


def _parse(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split(".")[:3]:
        digits = ""
        for char in part:
            if not char.isdigit():
                break
            digits += char
        numbers.append(int(digits or 0))
    return tuple(numbers)


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
