"""Fused functions: values and gradients are those of Megatron's own code, which runs where they cannot."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dyt.cpu import fused, kernels

needs_layer_kernels = pytest.mark.skipif(
    kernels._library is None, reason="the CPU kernels are not compiled: install gcc, then 'make setup'"
)
needs_attention_kernel = pytest.mark.skipif(
    not kernels.HAS_ATTENTION, reason="the CPU kernels are not compiled, or this processor lacks AVX-512"
)
GROUP = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))


def gradients_and_value(
    function: Callable[..., Tensor], inputs: list[Tensor], seed: int = 1
) -> tuple[Tensor, ...]:
    """function(*inputs), then the gradients of those of floating point for a random upstream gradient."""
    leaves = [each.detach().clone().requires_grad_(each.is_floating_point()) for each in inputs]
    value = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    value.backward(torch.randn(value.shape, generator=generator).to(value.dtype))
    return (value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))


# --- attention -----------------------------------------------------------------------------------------


def attention(monkeypatch: pytest.MonkeyPatch, mask_type: str = "causal", **settings: Any) -> torch.nn.Module:
    """Megatron's attention of 4 heads and 2 groups, 8 channels a head."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.utils import GlobalMemoryBuffer

    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer())
    random.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=settings.pop("groups", 2),
        **{"attention_dropout": 0.0, "masked_softmax_fusion": False, **settings},
    )
    return DotProductAttention(config, 2, AttnMaskType[mask_type], "self", pg_collection=GROUP)


def query_key_value(groups: int = 2, tokens: int = 11, keys: int = 11, dtype: Any = None) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (tokens, 3, 4, 8), (keys, 3, groups, 8), (keys, 3, groups, 8)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def plain(module: torch.nn.Module) -> Callable[..., Tensor]:
    """Megatron's own forward of `module`, below the runtime's."""
    return type(module).forward.__wrapped__.__get__(module)  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("implementation", [pytest.param("kernel", marks=needs_attention_kernel), "sdpa"])
@pytest.mark.parametrize("tokens", [11, 70])  # a block of queries in part, and more than two
@pytest.mark.parametrize(
    ("mask_type", "settings"),
    [
        ("causal", {}),
        ("causal", {"groups": 4}),
        ("causal", {"groups": 1}),
        ("no_mask", {}),
        ("padding", {}),
        ("causal", {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}),
    ],
)
def test_attention_without_scores_is_megatrons(
    runtime: None,
    monkeypatch: pytest.MonkeyPatch,
    mask_type: str,
    settings: dict[str, Any],
    tokens: int,
    implementation: str,
) -> None:
    settings = dict(settings)
    inputs = query_key_value(settings.get("groups", 2), tokens, tokens)
    module = attention(monkeypatch, mask_type, **settings)
    monkeypatch.setattr(torch, "baddbmm", None)  # what Megatron's needs
    if implementation == "kernel":
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    else:
        monkeypatch.setattr(kernels, "HAS_ATTENTION", False)
    found = gradients_and_value(lambda *qkv: module(*qkv, None), inputs)
    monkeypatch.undo()
    module = attention(monkeypatch, mask_type, **settings)
    expected = gradients_and_value(lambda *qkv: plain(module)(*qkv, None), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)  # sums of up to 280 terms
    assert found[0].is_contiguous()


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({}, {"attention_mask": torch.ones(3, 1, 11, 11, dtype=torch.bool).triu(1)}),
        ({"window_size": (4, 0)}, {}),
        ({"softmax_type": "off-by-one"}, {}),
        ({"attention_dropout": 0.5}, {}),
        ({"mask_type": "no_mask"}, {"keys": 13, "attention_mask": torch.rand(3, 1, 11, 13) > 0.7}),
        ({}, {"tokens": 1}),  # one more token, with the keys of those before
    ],
)
def test_attention_runs_as_megatrons_where_more_is_asked_for(
    runtime: None, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], given: dict[str, Any]
) -> None:
    from megatron.core.tensor_parallel import random

    mask = given.pop("attention_mask", None)
    inputs = query_key_value(**given)
    module = attention(monkeypatch, **settings)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    monkeypatch.setattr(kernels, "Attention", None)
    results = []
    for forward in (module, plain(module)):
        random.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0, force_reset_rng=True)
        results.append(gradients_and_value(lambda *qkv, forward=forward: forward(*qkv, mask), inputs))
    torch.testing.assert_close(*results, rtol=0, atol=0)


# --- what runs in C kernels ----------------------------------------------------------------------------


def angles(channels: int) -> Tensor:
    return torch.rand(11, 1, 1, channels, generator=torch.Generator().manual_seed(3)) * 7


def rotated(t: Tensor, channels: int = 8, **options: Any) -> Tensor:
    from megatron.core.models.common.embeddings import rope_utils

    return rope_utils._apply_rotary_pos_emb_bshd(t, angles(channels), **options)


def activated(y: Tensor) -> Tensor:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    return bias_swiglu_impl(y, None)


def loss(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    # A copy: Megatron and we write into the logits.
    return vocab_parallel_cross_entropy(logits.clone(), target, **options)


def normalized(x: Tensor, weight: Tensor) -> Tensor:
    norm = torch.nn.RMSNorm(x.shape[-1], eps=1e-5)
    value: Tensor = torch.func.functional_call(norm, {"weight": weight}, (x,))
    return value


@needs_attention_kernel
@pytest.mark.parametrize(("tokens", "keys", "channels"), [(33, 70, 33), (1, 40, 64), (65, 64, 16)])
def test_attention_to_other_keys_of_strided_heads(tokens: int, keys: int, channels: int) -> None:
    """As a view of the joint projection has them, and of any number of channels."""
    mixed = [random(n, 2, 3 * channels, scale=1).double() for n in (2 * tokens, keys, keys)]
    mixed[0] = mixed[0].view(tokens, 2, 2, 3 * channels)
    inputs = [each if each.dim() == 4 else each.unsqueeze(2) for each in mixed]

    def views(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        return [each[..., channels : 2 * channels] for each in (query, key, value)]

    def exact(*given: Tensor) -> Tensor:
        query, key, value = (each.permute(1, 2, 0, 3) for each in views(*given))
        return ((query @ key.mT * 0.3).softmax(-1) @ value).permute(2, 0, 1, 3)

    def ours(*given: Tensor) -> Tensor:
        return kernels.Attention.apply(*views(*given), False, 0.3)  # type: ignore[no-any-return]

    found = gradients_and_value(ours, [each.float() for each in inputs])
    for value, expected in zip(found, gradients_and_value(exact, inputs), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6 * scale)


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


TARGETS = torch.randint(0, 77, (7, 3), generator=torch.Generator().manual_seed(1))
# Function, inputs and options that the kernels take.
FUSED = {
    "rotary": (rotated, [random(11, 3, 4, 8)], {}),
    "rotary of a part": (rotated, [random(11, 3, 4, 10)], {"channels": 6}),
    "rotary of a view": (rotated, [random(11, 3, 4, 24)[..., 8:16]], {}),
    "rotary scaled": (rotated, [random(11, 3, 4, 8)], {"mscale": 1.3}),
    "swiglu": (activated, [random(7, 3, 70)], {}),
    "cross-entropy": (loss, [random(7, 3, 77), TARGETS], {}),
    "cross-entropy of an unknown piece": (loss, [random(7, 3, 77), TARGETS.clone().fill_(77)], {}),
    "cross-entropy of bf16": (loss, [random(7, 3, 77, dtype=torch.bfloat16), TARGETS], {}),
    "RMSNorm": (normalized, [random(70, 3, 77), random(77)], {}),
}
# The same with what the kernels do not compute.
OTHERS = {
    "rotary interleaved": (rotated, [random(11, 3, 4, 8)], {"rotary_interleaved": True}),
    "rotary of bf16": (rotated, [random(11, 3, 4, 8, dtype=torch.bfloat16)], {}),
    "swiglu of bf16": (activated, [random(7, 3, 70, dtype=torch.bfloat16)], {}),
    "smoothed cross-entropy": (loss, [random(7, 3, 77), TARGETS], {"label_smoothing": 0.1}),
    "RMSNorm of fp64": (normalized, [random(70, 77).double(), random(77).double()], {}),
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor parallel group of one rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import cross_entropy

    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    monkeypatch.setattr(cross_entropy, "get_tensor_model_parallel_group", lambda: group)
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_group", lambda *_: group)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)


def both(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Any, Any]:
    """The kernels that ran; values and gradients with them and without."""
    function, inputs, options = case
    ran: list[str] = []
    call = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda name, *rest: (ran.append(name), call(name, *rest))[1])
    found = gradients_and_value(lambda *given: function(*given, **options), inputs)
    monkeypatch.setattr(kernels, "_library", None)
    before = len(ran)
    expected = gradients_and_value(lambda *given: function(*given, **options), inputs)
    assert len(ran) == before
    return ran, found, expected


@needs_layer_kernels
@pytest.mark.parametrize("name", FUSED)
def test_values_and_gradients_are_megatrons(
    runtime: None, alone: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ran, found, expected = both(FUSED[name], monkeypatch)
    assert len(ran) == 2  # forward and backward
    assert len(found) == len(expected) >= 2
    for ours, megatrons in zip(found, expected, strict=True):
        scale = float(megatrons.abs().max())
        torch.testing.assert_close(ours, megatrons, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("name", OTHERS)
def test_megatrons_own_code_runs_where_the_kernels_cannot(
    runtime: None, alone: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ran, found, expected = both(OTHERS[name], monkeypatch)
    assert not ran
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_vocabulary_that_is_split_over_ranks_is_megatrons(runtime: None) -> None:
    original = SimpleNamespace(apply=lambda *given: given)
    given = (random(7, 3, 77), TARGETS, 0.0, SimpleNamespace(size=lambda: 2))
    assert fused.in_one_pass(original).apply(*given) == given


def test_a_norm_of_another_width_is_pytorchs_error(runtime: None) -> None:
    with pytest.raises(RuntimeError, match="normalized_shape"):
        torch.nn.RMSNorm(8)(random(3, 16))


@needs_layer_kernels
def test_a_second_derivative_is_refused(runtime: None) -> None:
    x = random(3, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(torch.nn.RMSNorm(16)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_layer_kernels
def test_the_gradient_of_a_loss_is_taken_once(runtime: None, alone: None) -> None:
    """It takes the logits' place, as in Megatron, where a second backward pass is an error too."""
    value = loss(random(7, 3, 77).requires_grad_(), TARGETS).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@needs_layer_kernels
def test_what_is_not_finite_is_seen_in_the_loss(runtime: None, alone: None) -> None:
    """Megatron's check for NaN and the guard look at the loss."""
    logits = random(5, 1, 77)
    for row, bad in enumerate((float("nan"), float("inf"), -float("inf"))):
        logits[row, 0, 5] = bad
    logits[3] = -float("inf")
    found = loss(logits, TARGETS[:5, :1]).isfinite()[:, 0].tolist()
    assert found == [False, False, True, False, True]
