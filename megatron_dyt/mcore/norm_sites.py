"""Where the norms of Megatron's models are, and that none of them stays unnoticed in a DyT model.

Most stand in the slots of a layer spec, which `spec.py` rewrites. Here are the others: those that a model
class builds itself, as DyT; those that a DyT model keeps on purpose (`KEPT`); and the check that there are
no more. A class that constructs a norm in another place would silently keep LayerNorm or RMSNorm; the
wrappers here make that a clear error, and what was built is searched once more. docs/families.md lists every
site of every family.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from torch import nn

from megatron_dyt.config import Role, is_dyt
from megatron_dyt.errors import UserError
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.ranks import log_once
from megatron_dyt.nn import DynamicTanh
from megatron_dyt.patching import bound, wrapper

if TYPE_CHECKING:
    from megatron.core.models.T5.t5_model import T5Model
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.models.vision.radio import RADIOViTModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

_log = logging.getLogger(__name__)

# Classes are matched by name: Transformer Engine and apex may not be installed.
NORM_CLASSES = {
    "WrappedTorchNorm",  # local spec
    "FusedLayerNorm",  # local spec with apex
    "TENorm",
    "_TENormWithResidual",  # TENorm that may be fused with the residual add, when asked to
    "LayerNorm",
    "RMSNorm",
    "TELayerNorm",
    "TERMSNorm",
}


# --- slots of a spec ---------------------------------------------------------------------------------


def dyt_spec(role: Role, **options: bool) -> ModuleSpec:
    """The spec of a DyTNorm. A ModuleSpec: 0.16 builds neither partials nor lambdas."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    return ModuleSpec(module=DyTNorm, params={"role": role, **options})


def is_norm(value: object) -> bool:
    """Whether a slot holds a LayerNorm/RMSNorm builder of Megatron, TE, apex or torch."""
    return class_name(value) in NORM_CLASSES


def class_name(value: object) -> str:
    """Name of the class that a slot builds: it holds a class, a ModuleSpec or a `functools.partial`."""
    if isinstance(value, functools.partial):
        value = value.func
    if hasattr(value, "module") and not isinstance(value, type):
        value = value.module
    return getattr(value, "__name__", type(value).__name__)


# --- DyT in a built model ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """One DyT of the model: its full name, and its layer's number from 1 (None for the final one)."""

    name: str
    layer: int | None
    module: DyTNorm


def dyt_sites(model: nn.Module) -> Iterator[tuple[str, DyTNorm]]:
    """(name, module) of every DyTNorm in a model, in the order of the module tree."""
    for name, module in model.named_modules():
        if isinstance(module, DyTNorm):
            yield name, module


def find_sites(chunks: Sequence[nn.Module]) -> list[Site]:
    """Every DyTNorm, named as in the whole model: layers count over pipeline stages.

    chunks: the model's chunks on this rank, several under virtual pipeline stages.
    """
    sites = []
    for chunk in map(unwrap, chunks):
        for name, module in dyt_sites(chunk):
            layer, full = global_name(chunk, name)
            sites.append(Site(full, layer, module))
    return sites


def global_name(chunk: nn.Module, name: str) -> tuple[int | None, str]:
    """(layer number from 1, name with the global layer index) from a name in a stage's own model."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit() and parts[index - 1] == "layers":
            layer = chunk.get_submodule(".".join(parts[: index + 1]))
            number = int(getattr(layer, "layer_number", int(part) + 1))
            return number, ".".join([*parts[:index], str(number - 1), *parts[index + 1 :]])
    return None, name


def unwrap(chunk: nn.Module) -> nn.Module:
    """The model inside DDP and mixed precision wrappers."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk


# --- norms that a model class builds itself, all outside the layers, so of the role "final" -------------


VISION_NORMS = ("ln_pre_impl", "ln_post_impl")
T5_BLOCKS = ("transformer_encoder_layer_spec", "transformer_decoder_layer_spec")


def wrap_norm_class[N](original: Callable[..., N]) -> Callable[..., N | DyTNorm]:
    """The norm class that a module's code calls by name: it builds DyT when the config's norm is DyT.

    For the final norm of a hybrid stack and the norm of BERT's language model head.
    """

    def build(
        config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **options: object
    ) -> N | DyTNorm:
        if is_dyt(config):
            return DyTNorm(config, hidden_size, eps, role="final")
        return original(config=config, hidden_size=hidden_size, eps=eps, **options)

    return build


@wrapper
def wrap_vision_init(
    original: Callable[..., None], self: CLIPViTModel | RADIOViTModel, *args: object, **kwargs: object
) -> None:
    """`CLIPViTModel.__init__` and `RADIOViTModel.__init__` with DyT for ln_pre and ln_post.

    Which of the two a model has is the model's decision.

    Raises:
        UserError: with sequence parallelism. These models hand the whole sequence to layers that expect a
            part of it: the loss stays right and the gradients come out twice too large.
    """
    given = bound(original, self, *args, **kwargs)
    given.apply_defaults()
    config = given.arguments["transformer_config"]
    if not is_dyt(config):
        original(*given.args, **given.kwargs)
        return
    if config.sequence_parallel:
        raise UserError(
            f"{type(self).__name__} has sequence_parallel in its config, but it does not split its "
            "input over the ranks, so gradients would be too large. Set sequence_parallel = False in "
            "the vision model's config."
        )
    norms = {name: given.arguments[name] for name in VISION_NORMS}
    given.arguments |= {name: dyt_spec("final") for name, norm in norms.items() if is_norm(norm)}
    original(*given.args, **given.kwargs)
    check_built(self, "vision_model")


@wrapper
def wrap_t5_init(original: Callable[..., None], self: T5Model, *args: object, **kwargs: object) -> None:
    """`T5Model.__init__` that has its two final norms without Transformer Engine too.

    Megatron's T5 block specs take TE's norm as the final one, the local specs as well; without TE they
    hold None, and the model would lack both.
    """
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    given = bound(original, self, *args, **kwargs)
    if is_dyt(given.arguments["config"]):
        for name in T5_BLOCKS:
            spec = given.arguments[name]
            if isinstance(spec, TransformerBlockSubmodules) and spec.layer_norm is None:
                given.arguments[name] = replace(spec, layer_norm=dyt_spec("final"))
    original(*given.args, **given.kwargs)


# --- norms that a DyT model keeps on purpose ------------------------------------------------------------
#
# They stand inside a mixer, not in front of a layer: replacing them would be another architecture or another
# kernel, not DyT in the place of a norm.


class Kept(NamedTuple):
    """One norm that stays: attribute `slot` of Megatron's class `owner`, or of its submodules in a spec."""

    owner: str
    slot: str
    what: str
    why: str


KEPT = (
    Kept(
        "MambaMixer",
        "norm",
        "the gated RMSNorm inside Mamba mixers",
        "it is computed inside Mamba's fused scan kernel",
    ),
    Kept(
        "GatedDeltaNet",
        "out_norm",
        "the gated RMSNorm on the output of each Gated DeltaNet head",
        "the state that it normalizes grows with the sequence, so a fixed alpha would not fit it",
    ),
    Kept(
        "DSAIndexer",
        "k_norm",
        "the LayerNorm on the keys of the sparse-attention indexer",
        "it only ranks tokens for selection; Megatron makes it a LayerNorm whatever the model's norm is",
    ),
)


def kept_in_slot(spec_class: str, field: str) -> Kept | None:
    """What stays in a field of a spec's dataclass, or None."""
    return next(
        (kept for kept in KEPT if (f"{kept.owner}Submodules", kept.slot) == (spec_class, field)), None
    )


def kept_in_module(parent: nn.Module, attribute: str) -> Kept | None:
    """What stays in an attribute of a built module (of a subclass too), or None."""
    owners = {base.__name__ for base in type(parent).__mro__}
    return next((kept for kept in KEPT if kept.owner in owners and kept.slot == attribute), None)


class KeptRMSNorm:
    """A norm's builder in a spec that builds Megatron's RMSNorm in a DyT model.

    `params` of its ModuleSpec: `norm`, the class that the slot held.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, norm: Callable[..., nn.Module]
    ) -> Any:
        """The norm, built for a copy of the config whose normalization is RMSNorm."""
        config = copy.copy(config)
        config.normalization = "RMSNorm"
        return norm(config=config, hidden_size=hidden_size, eps=eps)


# --- no other norm in a DyT model -----------------------------------------------------------------------


def other_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, Kept | None]]:
    """(name, module, what it is if it stays on purpose) of every norm in a model that is not DyT."""
    parents = dict(model.named_modules())
    for path, module in parents.items():
        if "norm" in type(module).__name__.lower() and not isinstance(module, DynamicTanh):
            parent, _, attribute = path.rpartition(".")
            yield path, module, kept_in_module(parents[parent], attribute)


def check_built(model: nn.Module, name: str) -> None:
    """Raise UserError when a part of a DyT model has a norm that is not DyT; log what stays on purpose.

    Args:
        model: what was built.
        name: what the model calls it, for the message.
    """
    for path, norm, kept in other_norms(model):
        if kept is None:
            raise UserError(
                f"{name}.{path} of this model is {type(norm).__name__}, which no slot of a layer spec shows, "
                "so --normalization DyT would leave a normalization layer in it (docs/families.md lists what "
                "is supported). Use another --normalization for this model."
            )
        log_once(_log, f"DyT: {kept.what} ({kept.owner}.{kept.slot}) stays as it is: {kept.why}.")


@wrapper
def wrap_block_init(
    original: Callable[..., None], self: nn.Module, config: TransformerConfig, *args: object, **kwargs: object
) -> None:
    """`TransformerBlock.__init__`, and a hybrid stack's, that searches what a DyT block was built of."""
    original(self, config, *args, **kwargs)
    if is_dyt(config):
        check_built(self, "decoder")


def wrap_norm_new(original: Callable[..., object]) -> staticmethod[..., object]:
    """`__new__` of a norm class that refuses to build for a DyT config."""
    return staticmethod(_new_unless_dyt(original))


@wrapper
def _new_unless_dyt[N](
    original: Callable[..., N], cls: type, config: object, *args: object, **kwargs: object
) -> N:
    if is_dyt(config):
        _refuse(cls.__name__)
    return original(cls, config, *args, **kwargs)


@wrapper
def wrap_norm_init(original: Callable[..., None], self: nn.Module, *args: object, **kwargs: object) -> None:
    """`__init__` of apex's norm or TE's fused norm-linear that refuses DyT configs."""
    if is_dyt(kwargs.get("config", args[0] if args else None)):
        _refuse(type(self).__name__)
    original(self, *args, **kwargs)


def _refuse(name: str) -> NoReturn:
    instead = "a DyTNorm" + (" and TEColumnParallelLinear" if "Linear" in name else "")
    raise UserError(
        f"{name} was asked for with --normalization DyT in its config, outside the layers where DyT takes "
        "a norm's place: transformer, Mamba and multi-token prediction layers, on their own or in a "
        f"model. Build it as part of such a layer, put {instead} there yourself "
        "(megatron_dyt.mcore.norm_sites.dyt_spec(ROLE) in a spec), or give this part's config another "
        "normalization. docs/families.md lists the places."
    )


# --- models of several parts, each with a config of its own -----------------------------------------------


@wrapper
def wrap_multimodal_init(
    original: Callable[..., None], self: nn.Module, *args: object, **kwargs: object
) -> None:
    """`LLaVAModel.__init__` that logs which parts keep the norm of their own config."""
    original(self, *args, **kwargs)
    log_other_norms(self)


def log_other_norms(model: nn.Module) -> None:
    """Log, for each part (child) of a model with DyT, that it has norms of another kind, where it has."""
    if not any(isinstance(module, DynamicTanh) for module in model.modules()):
        return
    found = Counter(
        (path.split(".")[0], type(norm).__name__) for path, norm, kept in other_norms(model) if not kept
    )
    for (part, norm), count in found.items():
        log_once(_log, f"DyT: {part} keeps its {count} {norm}: its own config has another normalization.")
