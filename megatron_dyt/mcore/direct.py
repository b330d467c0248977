"""Norms that a model class of Megatron builds itself, past the layer spec, as DyT.

All of them stand outside the layers, so they have the role "final".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_dyt.errors import UserError
from megatron_dyt.mcore import safety_net
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.spec import dyt_spec, is_norm

VISION_NORMS = ("ln_pre_impl", "ln_post_impl")
T5_BLOCKS = ("transformer_encoder_layer_spec", "transformer_decoder_layer_spec")


def wrap_norm_class(original: Callable[..., Any]) -> Callable[..., Any]:
    """The norm class that a module's code calls by name: it builds DyT when the config's norm is DyT.

    For the final norm of a hybrid stack and the norm of BERT's language model head.
    """

    def build(config: Any, hidden_size: int, eps: float = 1e-5, **options: Any) -> Any:
        if config.normalization == "DyT":
            return DyTNorm(config, hidden_size, eps, role="final")
        return original(config=config, hidden_size=hidden_size, eps=eps, **options)

    return build


def wrap_vision_init(original: Callable[..., None]) -> Callable[..., None]:
    """`CLIPViTModel.__init__` and `RADIOViTModel.__init__` with DyT for ln_pre and ln_post.

    Which of the two a model has is the model's decision.

    Raises:
        UserError: with sequence parallelism. These models hand the whole sequence to layers that expect a
            part of it: the loss stays right and the gradients come out twice too large.
    """
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        dyt = given.arguments["transformer_config"].normalization == "DyT"
        if dyt:
            if given.arguments["transformer_config"].sequence_parallel:
                raise UserError(
                    f"{type(self).__name__} has sequence_parallel in its config, but it does not split its "
                    "input over the ranks, so gradients would be too large. Set sequence_parallel = False in "
                    "the vision model's config."
                )
            norms = {name: given.arguments[name] for name in VISION_NORMS}
            given.arguments |= {name: dyt_spec("final") for name, norm in norms.items() if is_norm(norm)}
        original(*given.args, **given.kwargs)
        if dyt:
            safety_net.check_built(self, "vision_model")

    return __init__


def wrap_t5_init(original: Callable[..., None]) -> Callable[..., None]:
    """`T5Model.__init__` that has its two final norms without Transformer Engine too.

    Megatron's T5 block specs take TE's norm as the final one, the local specs as well; without TE they
    hold None, and the model would lack both.
    """
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    signature = inspect.signature(original)

    def filled(spec: Any) -> Any:
        if isinstance(spec, TransformerBlockSubmodules) and spec.layer_norm is None:
            return replace(spec, layer_norm=dyt_spec("final"))
        return spec

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        if given.arguments["config"].normalization == "DyT":
            given.arguments |= {name: filled(given.arguments[name]) for name in T5_BLOCKS}
        original(*given.args, **given.kwargs)

    return __init__
