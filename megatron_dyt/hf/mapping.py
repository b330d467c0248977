"""Megatron's tensors and a Hugging Face LLaMA's: which is which, and how they are split and folded.

A `Part` makes a few tensors from a few others, so that a conversion holds one part at a time.

    Megatron (one layer)                       Hugging Face (model.layers.N)
    self_attention.linear_qkv.layer_norm_*     input_layernorm.*
    self_attention.linear_qkv                  self_attn.q_proj, k_proj, v_proj: rows by query group
    self_attention.q_layernorm, k_layernorm    self_attn.q_norm, k_norm
    self_attention.linear_proj                 self_attn.o_proj
    mlp.linear_fc1.layer_norm_*                post_attention_layernorm.*
    mlp.linear_fc1                             mlp.gate_proj, up_proj: first and second half
    mlp.linear_fc2                             mlp.down_proj
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_dyt.hf.shape import LlamaShape

EMBEDDING = "embedding.word_embeddings.weight"
EMBEDDING_SCALE = "embedding.embedding_scale.scale"
FINAL_NORM = "decoder.final_layernorm."
OUTPUT = "output_layer.weight"
LAYERS = "decoder.layers."
QKV = "self_attention.linear_qkv."
PROJ = "self_attention.linear_proj."
FC1 = "mlp.linear_fc1."
FC2 = "mlp.linear_fc2."
# Megatron's prefix and Hugging Face's, in a layer, by DyT's role.
LAYER_NORMS = (
    ("attn", f"{QKV}layer_norm_", "input_layernorm."),
    ("ffn", f"{FC1}layer_norm_", "post_attention_layernorm."),
    ("qk", "self_attention.q_layernorm.", "self_attn.q_norm."),
    ("qk", "self_attention.k_layernorm.", "self_attn.k_norm."),
)

Shapes = dict[str, tuple[int, ...]]


class Source(Protocol):
    """Where a conversion's tensors come from."""

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """The tensor `key`; with `layer` the one of that layer."""


class Part(NamedTuple):
    """Tensors that are made together: their shapes by name, and the function that makes them."""

    shapes: Shapes
    make: Callable[[], dict[str, Tensor]]


# --- shapes ---------------------------------------------------------------------------------------


def norm_shapes(shape: LlamaShape, size: int) -> Shapes:
    """Parameters of one norm over `size` channels."""
    if shape.dyt is None:
        return {"weight": (size,)}
    shapes: Shapes = {"alpha": (1,), "weight": (size,)}
    if shape.dyt.bias:
        shapes["bias"] = (size,)
    if shape.dyt.function == "erf":
        shapes["shift"] = (1,)
    return shapes


def megatron_layer_shapes(shape: LlamaShape) -> Shapes:
    """Megatron's tensors of one layer, by their name in it."""
    hidden, query = shape.hidden_size, shape.heads * shape.head_dim
    qkv = query + 2 * shape.kv_heads * shape.head_dim
    shapes: Shapes = {
        f"{QKV}weight": (qkv, hidden),
        f"{PROJ}weight": (hidden, query),
        f"{FC1}weight": (2 * shape.ffn_size, hidden),
        f"{FC2}weight": (hidden, shape.ffn_size),
    }
    if shape.qkv_bias:
        shapes[f"{QKV}bias"] = (qkv,)
    if shape.linear_bias:
        shapes |= {f"{PROJ}bias": (hidden,), f"{FC1}bias": (2 * shape.ffn_size,), f"{FC2}bias": (hidden,)}
    for role, prefix, _ in layer_norms(shape):
        size = shape.head_dim if role == "qk" else hidden
        shapes |= _prefixed(prefix, norm_shapes(shape, size))
    return shapes


def layer_norms(shape: LlamaShape) -> list[tuple[str, str, str]]:
    """The rows of LAYER_NORMS that this model has."""
    return [row for row in LAYER_NORMS if row[0] != "qk" or shape.qk_layernorm]


def megatron_shapes(shape: LlamaShape) -> Shapes:
    """Megatron's tensors, those of the layers stacked along a first dimension, as torch_dist has them."""
    table = (shape.vocab_size, shape.hidden_size)
    shapes: Shapes = {EMBEDDING: table}
    if shape.embedding_scale is not None:
        shapes[EMBEDDING_SCALE] = (1,)
    for name, size in megatron_layer_shapes(shape).items():
        shapes[f"{LAYERS}{name}"] = (shape.num_layers, *size)
    shapes |= _prefixed(FINAL_NORM, norm_shapes(shape, shape.hidden_size))
    if not shape.tied:
        shapes[OUTPUT] = table
    return shapes


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}{name}": size for name, size in shapes.items()}


# --- to Hugging Face ------------------------------------------------------------------------------


class Biases(NamedTuple):
    """Which linear layers of the exported model have a bias; transformers knows no finer choice."""

    attention: bool
    mlp: bool
    lm_head: bool


def hf_biases(shape: LlamaShape, folded: Collection[str]) -> Biases:
    """The biases of the export: Megatron's, and those that a folded DyT bias becomes."""
    beta = shape.dyt is not None and shape.dyt.bias
    return Biases(
        attention=shape.qkv_bias or (beta and "attn" in folded),
        mlp=shape.linear_bias or (beta and "ffn" in folded),
        lm_head=beta and "final" in folded,
    )


def hf_parts(shape: LlamaShape, source: Source, folded: Collection[str] = ()) -> Iterator[Part]:
    """The export's tensors, in the model's order.

    Args:
        shape: `vocab_size` rows of the embedding and the output layer are taken.
        source: Megatron's tensors, by the names of `megatron_shapes`.
        folded: roles (attn, ffn, final) whose DyT weight and bias go into the linear layer behind them.
            The weight multiplies that layer's columns; the bias b becomes its bias W b.
    """
    biases = hf_biases(shape, folded)
    yield _embedding(shape, source)
    for layer in range(shape.num_layers):
        yield from _layer(_LayerSource(source, layer), shape, folded, biases, f"model.layers.{layer}.")
    yield _norm(source, shape, FINAL_NORM, "model.norm.", shape.hidden_size, "final" in folded)
    if not shape.tied or _unties(shape):
        yield _output(shape, source, folded, biases)


def hf_shapes(shape: LlamaShape, folded: Collection[str] = ()) -> Shapes:
    """Names and shapes of the tensors that `hf_parts` makes."""
    parts = hf_parts(shape, _NoSource(), folded)
    return {name: size for part in parts for name, size in part.shapes.items()}


class _NoSource:
    """Shapes are known without a value."""

    def read(self, key: str, layer: int | None = None) -> Tensor:
        raise AssertionError(f"{key} was read for its shape")


def _unties(shape: LlamaShape) -> bool:
    """Whether folding the embedding scale away splits a shared embedding into two."""
    return shape.tied and shape.dyt is None and shape.embedding_scale is not None


def hf_tied(shape: LlamaShape) -> bool:
    """Whether the export's output layer is its embedding."""
    return shape.tied and not _unties(shape)


class _LayerSource(NamedTuple):
    source: Source
    layer: int

    def read(self, key: str, layer: int | None = None) -> Tensor:
        return self.source.read(f"{LAYERS}{key}", self.layer)


def _embedding(shape: LlamaShape, source: Source) -> Part:
    name = "model.embed_tokens."
    shapes: Shapes = {f"{name}weight": (shape.vocab_size, shape.hidden_size)}
    if shape.dyt is not None and shape.embedding_scale is not None:
        shapes[f"{name}scale"] = (1,)

    def make() -> dict[str, Tensor]:
        table = source.read(EMBEDDING)[: shape.vocab_size]
        if shape.embedding_scale is None:
            return {f"{name}weight": table}
        scale = source.read(EMBEDDING_SCALE)
        if shape.dyt is None:
            # LLaMA has no such scalar. Rounded as Megatron rounds the scaled embedding's output.
            return {f"{name}weight": (table * scale.float()).to(table.dtype)}
        return {f"{name}weight": table, f"{name}scale": scale}

    return Part(shapes, make)


def _output(shape: LlamaShape, source: Source, folded: Collection[str], biases: Biases) -> Part:
    shapes: Shapes = {"lm_head.weight": (shape.vocab_size, shape.hidden_size)}
    if biases.lm_head:
        shapes["lm_head.bias"] = (shape.vocab_size,)

    def make() -> dict[str, Tensor]:
        weight: Tensor = source.read(EMBEDDING if shape.tied else OUTPUT)[: shape.vocab_size]
        bias = None
        if "final" in folded:
            weight, bias = _fold(source, FINAL_NORM, shape, weight, None)
        return _named("lm_head", weight, bias)

    return Part(shapes, make)


def _layer(
    source: _LayerSource, shape: LlamaShape, folded: Collection[str], biases: Biases, name: str
) -> Iterator[Part]:
    for role, theirs, ours in layer_norms(shape):
        size = shape.head_dim if role == "qk" else shape.hidden_size
        yield _norm(source, shape, theirs, f"{name}{ours}", size, role in folded)
    yield _qkv(source, shape, "attn" in folded, biases.attention, f"{name}self_attn.")
    yield _linear(source, shape, PROJ, f"{name}self_attn.o_proj", biases.attention)
    yield _gate_up(source, shape, "ffn" in folded, biases.mlp, f"{name}mlp.")
    yield _linear(source, shape, FC2, f"{name}mlp.down_proj", biases.mlp)


def _norm(source: Source, shape: LlamaShape, theirs: str, ours: str, size: int, folded: bool) -> Part:
    kept = {
        name: length
        for name, length in norm_shapes(shape, size).items()
        if not (folded and name in ("weight", "bias"))
    }
    return Part(
        _prefixed(ours, kept), lambda: {f"{ours}{name}": source.read(f"{theirs}{name}") for name in kept}
    )


def _qkv(source: Source, shape: LlamaShape, folded: bool, bias: bool, name: str) -> Part:
    query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    rows = {"q_proj": query, "k_proj": keys, "v_proj": keys}

    def make() -> dict[str, Tensor]:
        linear = _read_linear(source, shape, QKV, folded, shape.qkv_bias, bias)
        parts = [split_qkv(tensor, shape) for tensor in linear]
        return _merged(_named(f"{name}{proj}", *tensors) for proj, *tensors in zip(rows, *parts, strict=True))

    return Part(_linear_shapes(name, rows, shape.hidden_size, bias), make)


def _gate_up(source: Source, shape: LlamaShape, folded: bool, bias: bool, name: str) -> Part:
    rows = {"gate_proj": shape.ffn_size, "up_proj": shape.ffn_size}

    def make() -> dict[str, Tensor]:
        linear = _read_linear(source, shape, FC1, folded, shape.linear_bias, bias)
        parts = [tensor.chunk(2) for tensor in linear]
        return _merged(_named(f"{name}{proj}", *tensors) for proj, *tensors in zip(rows, *parts, strict=True))

    return Part(_linear_shapes(name, rows, shape.hidden_size, bias), make)


def _linear(source: Source, shape: LlamaShape, theirs: str, ours: str, bias: bool) -> Part:
    rows, columns = megatron_layer_shapes(shape)[f"{theirs}weight"]
    shapes = _linear_shapes("", {ours: rows}, columns, bias)
    return Part(
        shapes,
        lambda: _named(ours, *_read_linear(source, shape, theirs, False, shape.linear_bias, bias)),
    )


def _read_linear(
    source: Source, shape: LlamaShape, prefix: str, folded: bool, has_bias: bool, wants_bias: bool
) -> list[Tensor]:
    """[weight] or [weight, bias] of a linear layer, with the norm in front of it folded in."""
    weight = source.read(f"{prefix}weight")
    bias = source.read(f"{prefix}bias") if has_bias else None
    if folded:
        weight, bias = _fold(source, f"{prefix}layer_norm_", shape, weight, bias)
    if bias is None and wants_bias:
        bias = weight.new_zeros(weight.shape[0])
    return [weight] if bias is None else [weight, bias]


def _fold(
    source: Source, norm: str, shape: LlamaShape, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    beta = source.read(f"{norm}bias") if shape.dyt is not None and shape.dyt.bias else None
    return fold_norm(weight, bias, source.read(f"{norm}weight"), beta)


def fold_norm(
    weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) in fp32 of the linear layer that does to t what this one does to gamma * t + beta.

    Shapes: weight (out, in), bias (out,), gamma and beta (in,).
    """
    wide = weight.float()
    if beta is not None:
        moved = wide @ beta.float()
        bias = moved if bias is None else moved + bias.float()
    return wide * gamma.float(), bias


def split_qkv(qkv: Tensor, shape: LlamaShape) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's rows of linear_qkv, (queries of the group, key, value) for each query group, as q, k, v.

    Rows within a head keep their order: both use the rotary embedding that pairs its halves.
    """
    per_group = shape.heads // shape.kv_heads
    rest = qkv.shape[1:]
    groups = qkv.view(shape.kv_heads, per_group + 2, shape.head_dim, *rest)
    q, k, v = groups[:, :per_group], groups[:, -2], groups[:, -1]
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


def join_qkv(q: Tensor, k: Tensor, v: Tensor, shape: LlamaShape) -> Tensor:
    """The inverse of `split_qkv`."""
    rest = q.shape[1:]
    queries = q.view(shape.kv_heads, -1, shape.head_dim, *rest)
    keys, values = (t.view(shape.kv_heads, 1, shape.head_dim, *rest) for t in (k, v))
    return torch.cat((queries, keys, values), dim=1).reshape(-1, *rest)


def _linear_shapes(prefix: str, rows: dict[str, int], columns: int, bias: bool) -> Shapes:
    shapes: Shapes = {}
    for name, count in rows.items():
        shapes[f"{prefix}{name}.weight"] = (count, columns)
        if bias:
            shapes[f"{prefix}{name}.bias"] = (count,)
    return shapes


def _named(name: str, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    named = {f"{name}.weight": weight}
    return named if bias is None else named | {f"{name}.bias": bias}


def _merged(dicts: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in dicts for name, tensor in part.items()}
