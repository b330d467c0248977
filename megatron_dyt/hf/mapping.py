"""Megatron's tensors and a Hugging Face LLaMA's: one table of names, and what lies between the two sides.

A module is a row of NAMES, in a layer or outside of the layers. Export and import go module by module, so a
conversion need not hold more than one module's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dyt.config import Role
from megatron_dyt.hf.model import Model
from megatron_dyt.llama import LlamaShape
from megatron_dyt.ops.parameters import alpha_of_log

EMBEDDING = "embedding.word_embeddings."
EMBEDDING_SCALE = "embedding.embedding_scale."
LAYERS = "decoder.layers."
QKV = f"{LAYERS}N.self_attention.linear_qkv."
ATTN_NORM = f"{QKV}layer_norm_"
Q_NORM = f"{LAYERS}N.self_attention.q_layernorm."
K_NORM = f"{LAYERS}N.self_attention.k_layernorm."
PROJ = f"{LAYERS}N.self_attention.linear_proj."
FC1 = f"{LAYERS}N.mlp.linear_fc1."
FFN_NORM = f"{FC1}layer_norm_"
FC2 = f"{LAYERS}N.mlp.linear_fc2."
FINAL_NORM = "decoder.final_layernorm."
OUTPUT = "output_layer."

# Megatron's module and Hugging Face's, without the tensor's own name (weight, bias, alpha, shift, scale);
# N is the layer. Where there are several, Megatron has their rows in one tensor: see `split` and `join`.
NAMES: dict[str, tuple[str, ...]] = {
    EMBEDDING: ("model.embed_tokens.",),
    EMBEDDING_SCALE: ("model.embed_tokens.",),
    ATTN_NORM: ("model.layers.N.input_layernorm.",),
    QKV: tuple(f"model.layers.N.self_attn.{each}_proj." for each in "qkv"),
    Q_NORM: ("model.layers.N.self_attn.q_norm.",),
    K_NORM: ("model.layers.N.self_attn.k_norm.",),
    PROJ: ("model.layers.N.self_attn.o_proj.",),
    FFN_NORM: ("model.layers.N.post_attention_layernorm.",),
    FC1: ("model.layers.N.mlp.gate_proj.", "model.layers.N.mlp.up_proj."),
    FC2: ("model.layers.N.mlp.down_proj.",),
    FINAL_NORM: ("model.norm.",),
    OUTPUT: ("lm_head.",),
}
# The linear layers that have a norm in front of them: its role, and where it is.
FOLDS = {QKV: ("attn", ATTN_NORM), FC1: ("ffn", FFN_NORM), OUTPUT: ("final", FINAL_NORM)}

# (key of NAMES with the tensor's own name, layer) -> the tensor. Reads one layer's part.
Read = Callable[[str, int | None], Tensor]
Sizes = dict[str, tuple[int, ...]]


class Module(NamedTuple):
    """A row of NAMES, and its layer (None outside of the layers)."""

    row: str
    layer: int | None

    def hf_names(self, tensor: str) -> list[str]:
        """Hugging Face's names of this module's tensor "weight", "bias" or the like."""
        return [f"{name.replace('.N.', f'.{self.layer}.')}{tensor}" for name in NAMES[self.row]]


def modules(model: Model) -> list[Module]:
    """All modules that a model may have, in the order in which data pass through it."""
    rows = list(NAMES)
    first, last = rows.index(ATTN_NORM), rows.index(FINAL_NORM)
    in_layers = product(range(model.shape.num_layers), rows[first:last])
    return [
        *(Module(row, None) for row in rows[:first]),
        *(Module(row, layer) for layer, row in in_layers),
        *(Module(row, None) for row in rows[last:]),
    ]


# --- which tensors there are ----------------------------------------------------------------------


def megatron_sizes(model: Model) -> dict[str, Sizes]:
    """The tensors of every row of NAMES in Megatron, those of one layer, by their own name."""
    shape, hidden = model.shape, model.shape.hidden_size
    head_norm = _norm(model, shape.head_dim, "qk") if shape.qk_layernorm else {}
    return {
        EMBEDDING: _linear(shape.vocab_size, hidden),
        EMBEDDING_SCALE: {} if model.embedding_scale is None else {"scale": (1,)},
        ATTN_NORM: _norm(model, hidden, "attn"),
        QKV: _linear(shape.query_size + 2 * shape.key_size, hidden, shape.qkv_bias),
        Q_NORM: head_norm,
        K_NORM: head_norm,
        PROJ: _linear(hidden, shape.query_size, shape.linear_bias),
        FFN_NORM: _norm(model, hidden, "ffn"),
        FC1: _linear(2 * shape.ffn_hidden_size, hidden, shape.linear_bias),
        FC2: _linear(hidden, shape.ffn_hidden_size, shape.linear_bias),
        FINAL_NORM: _norm(model, hidden, "final"),
        OUTPUT: {} if shape.tie_embeddings else _linear(shape.vocab_size, hidden),
    }


def _linear(rows: int, columns: int, bias: bool = False) -> Sizes:
    return {"weight": (rows, columns)} | ({"bias": (rows,)} if bias else {})


def _norm(model: Model, size: int, role: Role) -> Sizes:
    if model.dyt is None:
        return {"weight": (size,)}
    sizes: Sizes = {"log_alpha" if model.dyt.log_alpha else "alpha": (1,), "weight": (size,)}
    if model.dyt.has_running_scale(role):
        sizes["input_rms"] = (1,)
    if model.dyt.alpha_floor(role):
        sizes["alpha_floor"] = (1,)
    if model.dyt.bias:
        sizes["bias"] = (size,)
    if model.dyt.function == "erf":
        sizes["shift"] = (1,)
    return sizes


def _hf_sizes(model: Model, folded: Collection[str]) -> dict[str, Sizes]:
    """The tensors of every row of NAMES in the export, before they are split."""
    sizes, shape = megatron_sizes(model), model.hf_shape(folded)
    for row in sizes:
        for state in ("input_rms", "alpha_floor"):
            sizes[row].pop(state, None)
        sizes[row] = {"alpha" if name == "log_alpha" else name: size for name, size in sizes[row].items()}
    if model.scale_is_folded(folded):
        sizes[EMBEDDING_SCALE] = {}
    if not shape.tie_embeddings:
        sizes[OUTPUT] = dict(sizes[EMBEDDING])
    biased = {QKV: shape.qkv_bias, PROJ: shape.qkv_bias, FC1: shape.linear_bias, FC2: shape.linear_bias}
    for row, has_bias in biased.items():
        if has_bias:
            sizes[row]["bias"] = sizes[row]["weight"][:1]
    for role, norm in FOLDS.values():
        if role in folded:
            sizes[norm] = {name: size for name, size in sizes[norm].items() if name in ("alpha", "shift")}
    return sizes


def hf_tensors(
    model: Model, folded: Collection[str] = (), dtype: torch.dtype = torch.float32
) -> dict[Module, dict[str, Tensor]]:
    """The tensors of every module of the export by Hugging Face's names, on the meta device."""
    sizes, found = _hf_sizes(model, folded), {}
    for module in modules(model):
        whole = {
            name: torch.empty(size, dtype=dtype, device="meta") for name, size in sizes[module.row].items()
        }
        found[module] = _split_all(module, whole, model)
    return found


def _split_all(module: Module, tensors: dict[str, Tensor], model: Model) -> dict[str, Tensor]:
    return {
        hf_name: part
        for name, tensor in tensors.items()
        for hf_name, part in zip(module.hf_names(name), split(module.row, tensor, model.shape), strict=True)
    }


# --- to Hugging Face ------------------------------------------------------------------------------


def exported(module: Module, model: Model, read: Read, folded: Collection[str] = ()) -> dict[str, Tensor]:
    """What becomes of a module in the export, by Hugging Face's names: in the checkpoint's dtypes, an alpha
    that was computed in fp32, as in training.

    Args:
        model: its `vocab_size` rows of the embedding and the output layer are taken.
        read: gives Megatron's tensors.
        folded: roles (attn, ffn, final) whose DyT weight and bias go into the linear layer behind them.
            The weight multiplies that layer's columns; the bias b becomes its bias W b.
    """
    row, layer = module
    sizes, wanted = megatron_sizes(model), _hf_sizes(model, folded)[row]
    source = EMBEDDING if row == OUTPUT and model.shape.tie_embeddings else row
    tensors = {name: read(source + name, layer) for name in sizes[source] if name in wanted}
    if model.dyt is not None and "log_alpha" in sizes[source]:
        log_alpha = read(f"{source}log_alpha", layer)
        floor = read(f"{source}alpha_floor", layer) if "alpha_floor" in sizes[source] else None
        tensors["alpha"] = alpha_of_log(log_alpha, model.dyt.log_alpha_rate, floor)
    if "input_rms" in sizes[source]:
        tensors["alpha"] = tensors["alpha"].float() / read(f"{source}input_rms", layer)
    if source in (EMBEDDING, OUTPUT) and tensors:
        tensors["weight"] = tensors["weight"][: model.shape.vocab_size]
    if row == EMBEDDING and model.scale_is_folded(folded):
        # Rounded as Megatron rounds the scaled embedding's output.
        table, scale = tensors["weight"], read(f"{EMBEDDING_SCALE}scale", None)
        tensors["weight"] = (table * scale.float()).to(table.dtype)
    role, norm = FOLDS.get(row, ("", ""))
    if role in folded:
        affine = [read(norm + name, layer) for name in ("weight", "bias") if name in sizes[norm]]
        tensors |= fold_norm(tensors["weight"], tensors.get("bias"), *affine)
    for name in wanted.keys() - tensors.keys():  # A bias that only transformers wants.
        tensors[name] = torch.zeros(wanted[name])
    return _split_all(module, tensors, model)


def fold_norm(
    weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor | None = None
) -> dict[str, Tensor]:
    """In fp32 the linear layer that does to t what this one does to gamma * t + beta.

    Shapes: weight (out, in), bias (out,), gamma and beta (in,).
    """
    wide = weight.float()
    folded = {"weight": wide * gamma.float()}
    if beta is not None:
        moved = wide @ beta.float()
        folded["bias"] = moved if bias is None else moved + bias.float()
    return folded


# --- to Megatron ----------------------------------------------------------------------------------


def imported(module: Module, name: str, model: Model, read: Callable[[str], Tensor]) -> Tensor:
    """Megatron's tensor `name` of a module, from what `read` gives by Hugging Face's names.

    Rows of the vocabulary that Hugging Face does not have are 0.
    """
    tensor = join(module.row, [read(hf_name) for hf_name in module.hf_names(name)], model.shape)
    missing = model.shape.vocab_size - len(tensor) if module.row in (EMBEDDING, OUTPUT) else 0
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing)) if missing else tensor


# --- tensors that Megatron has in one -------------------------------------------------------------


def split(row: str, tensor: Tensor, shape: LlamaShape) -> tuple[Tensor, ...]:
    """Hugging Face's tensors in one of Megatron's, in the order of `NAMES[row]`."""
    if row == QKV:
        return split_qkv(tensor, shape)
    return tensor.chunk(len(NAMES[row]))


def join(row: str, parts: list[Tensor], shape: LlamaShape) -> Tensor:
    """The inverse of `split`."""
    if row == QKV:
        q, k, v = parts
        return join_qkv(q, k, v, shape)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def split_qkv(qkv: Tensor, shape: LlamaShape) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's linear_qkv (Q + 2K, ...) as q (Q, ...), k (K, ...) and v (K, ...).

    Q and K are shape.query_size and key_size. Megatron has for each query group its queries, key, value. Rows
    within a head keep their order: both sides use the rotary embedding that pairs a head's halves.
    """
    per_group = shape.num_attention_heads // shape.num_query_groups
    rest = qkv.shape[1:]
    groups = qkv.view(shape.num_query_groups, per_group + 2, shape.head_dim, *rest)
    q, k, v = groups[:, :per_group], groups[:, -2], groups[:, -1]
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


def join_qkv(q: Tensor, k: Tensor, v: Tensor, shape: LlamaShape) -> Tensor:
    """The inverse of `split_qkv`."""
    rest = q.shape[1:]
    queries = q.view(shape.num_query_groups, -1, shape.head_dim, *rest)
    keys, values = (t.view(shape.num_query_groups, 1, shape.head_dim, *rest) for t in (k, v))
    return torch.cat((queries, keys, values), dim=1).reshape(-1, *rest)
