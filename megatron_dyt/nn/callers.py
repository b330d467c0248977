"""Code that computes a norm itself from the norm's weight, without calling it.

In the place of a norm, DyT must not be read so: its weight is another one. PyTorch's encoder layers have a
switch and are kept off; of what others do, the source tells.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import FunctionType

from torch import nn

from megatron_dyt.nn.dynamic_tanh import DynamicTanh

# PyTorch's layers that compute norms in fused kernels when they evaluate, and the attribute that, being
# false, keeps them off (torch/nn/modules/transformer.py).
_FAST_PATHS: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}

# `norm.weight.dtype` says nothing about what the weight is used for.
_HARMLESS = ("dtype", "device", "shape")
_OF_A_NORM = ("weight", "bias", "eps", "variance_epsilon", "normalized_shape")


def set_fast_paths(model: nn.Module) -> None:
    """Keep PyTorch's encoder layers that hold a DyT off their fused kernels; give others theirs back."""
    for module in model.modules():
        for kind, attribute in _FAST_PATHS.items():
            kept = f"{attribute}_with_norms"
            if not isinstance(module, kind) or not hasattr(module, attribute):
                continue
            has_dyt = any(isinstance(each, DynamicTanh) for each in module.modules())
            if has_dyt and not hasattr(module, kept):
                value = getattr(module, attribute)
                setattr(module, kept, value)
                setattr(module, attribute, type(value)())
            elif not has_dyt and hasattr(module, kept):
                setattr(module, attribute, getattr(module, kept))
                delattr(module, kept)


def fused_reads(kind: type[nn.Module]) -> dict[str, str]:
    """Children whose weight, bias or eps a class's forward reads, and the first such "child.attribute".

    Looked through are `forward` and the methods that it names; what is read for its dtype, device or shape
    alone does not count. A class without source has none.
    """
    found: dict[str, str] = {}
    pending, seen = ["forward"], {"forward"}
    while pending:
        method = getattr(kind, pending.pop(), None)
        tree = _parsed(method)
        aliases = _aliases(tree)
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                read = _own_attribute(child, aliases)
                if read is None:
                    continue
                name, attribute = read
                if attribute is None:
                    if name not in seen and isinstance(getattr(kind, name, None), FunctionType):
                        seen.add(name)
                        pending.append(name)
                elif attribute in _OF_A_NORM and not (
                    isinstance(node, ast.Attribute) and node.attr in _HARMLESS
                ):
                    found.setdefault(name, f"{name}.{attribute}")
    return found


def _parsed(method: Callable[..., object] | None) -> ast.AST:
    is_torchs = getattr(method, "__module__", "") == nn.TransformerEncoderLayer.__module__  # see _FAST_PATHS
    if method is None or is_torchs:
        return ast.Module([], [])
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Local names of children: {"n": "norm"} for n = self.norm."""
    found = {}
    for node in ast.walk(tree):
        match node:
            case ast.Assign([ast.Name(alias)], ast.Attribute(ast.Name("self"), str(name))):
                found[alias] = name
    return found


def _own_attribute(node: ast.AST, aliases: Mapping[str, str]) -> tuple[str, str | None] | None:
    """("norm", "weight") for a reading of self.norm.weight, ("norm", None) for one of self.norm."""
    match node:
        case ast.Attribute(ast.Name(alias), str(attribute), ast.Load()) if alias in aliases:
            return aliases[alias], attribute
        case ast.Attribute(ast.Attribute(ast.Name("self"), str(name)), str(attribute), ast.Load()):
            return name, attribute
        case ast.Attribute(ast.Name("self"), str(name), ast.Load()):
            return name, None
    return None
