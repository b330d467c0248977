"""Norms are recognised by what they compute: patterns of other people's classes, written by hand."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dyt import DynamicTanh, convert_norms
from megatron_dyt.nn.norms import Norm, examine
from tests.shaken import shaken

SIZE = 12


class OwnNorm(nn.Module):
    """An RMSNorm with tensors of any name and shape."""

    def __init__(self, name: str = "weight", shape: tuple[int, ...] = (SIZE,), **options: bool) -> None:
        super().__init__()
        self.name, self.options = name, options
        self.register_parameter(name, nn.Parameter(torch.ones(shape)))
        if options.get("bias_buffer"):
            self.register_buffer("beta", torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        if self.options.get("center"):
            x = x - x.mean(-1, keepdim=True)
        y = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * getattr(self, self.name)
        return y + self.beta if self.options.get("bias_buffer") else y


class RootMeanSquare(OwnNorm):
    """Its class does not end in Norm."""


class ZeroCenteredRMSNorm(nn.Module):
    """Gemma's: the weight is what it multiplies by, less 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt() * (1 + self.weight)


class ZeroCenteredLayerNorm(nn.LayerNorm):
    """Nemotron's: the same of a LayerNorm, in a class derived from PyTorch's."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    """timm's: of images (batch, channels, height, width), over the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FormattedLayerNorm(nn.LayerNorm):
    """ConvNeXt's in transformers: one class for both, told by an argument."""

    def __init__(self, size: int, data_format: str) -> None:
        super().__init__(size, eps=1e-6)
        self.data_format = data_format

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_last":
            return super().forward(x)
        mean = x.mean(1, keepdim=True)
        y = (x - mean) / ((x - mean).square().mean(1, keepdim=True) + self.eps).sqrt()
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class VideoRMSNorm(nn.Module):
    """As in video autoencoders: normalized by `F.normalize`, a gain of shape (channels, 1, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(SIZE, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * SIZE**0.5 * self.gamma


class Rounding(nn.Module):
    """Computes in fp32 and rounds to bf16 before the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * x.float().square().mean(-1, keepdim=True).add(1e-5).rsqrt()
        return self.weight * y.to(torch.bfloat16)


class InPlaceNorm(OwnNorm):
    """Writes over its input."""

    def forward(self, x: Tensor) -> Tensor:
        x *= x.square().mean(-1, keepdim=True).rsqrt()
        return x.mul_(self.weight)


class WeightlessNorm(nn.Module):
    """OLMo's: a LayerNorm without parameters, which knows its size."""

    normalized_shape = (SIZE,)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape)


def llama_norm() -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(SIZE)


class Kind:
    """How a norm is made, over which dimension it goes, and its gain and shift from its tensors."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        gain: str | None = "weight",
        shift: str | None = None,
        *,
        dim: int = -1,
        less: int = 0,
    ) -> None:
        self.make, self.gain, self.shift, self.dim, self.less = make, gain, shift, dim, less


KINDS = {
    "LayerNorm": Kind(lambda: nn.LayerNorm(SIZE), shift="bias"),
    "LayerNorm without bias": Kind(lambda: nn.LayerNorm(SIZE, bias=False)),
    "LayerNorm without weight": Kind(lambda: nn.LayerNorm(SIZE, elementwise_affine=False), None),
    "RMSNorm": Kind(lambda: nn.RMSNorm(SIZE)),
    "transformers": Kind(llama_norm),
    "zero-centered RMSNorm": Kind(ZeroCenteredRMSNorm, less=1),
    "zero-centered LayerNorm": Kind(lambda: ZeroCenteredLayerNorm(SIZE), shift="bias", less=1),
    "own RMSNorm": Kind(OwnNorm),
    "own LayerNorm": Kind(lambda: OwnNorm(center=True)),
    "weight of another name": Kind(lambda: OwnNorm("scale"), "scale"),
    "weight of another shape": Kind(lambda: OwnNorm("g", (1, SIZE)), "g"),
    "bias that is a buffer": Kind(lambda: OwnNorm("gamma", bias_buffer=True), "gamma", "beta"),
    "class of another name": Kind(RootMeanSquare),
    "rounding": Kind(Rounding),
    "in place": Kind(InPlaceNorm),
    "weightless": Kind(WeightlessNorm, None),
    "channels first": Kind(lambda: LayerNorm2d(SIZE), shift="bias", dim=1),
    "channels first by an argument": Kind(
        lambda: FormattedLayerNorm(SIZE, "channels_first"), shift="bias", dim=1
    ),
    "channels last by an argument": Kind(lambda: FormattedLayerNorm(SIZE, "channels_last"), shift="bias"),
    "video": Kind(VideoRMSNorm, "gamma", dim=1),
}


def values(norm: nn.Module, name: str | None, less: int = 0) -> Tensor:
    """A norm's gain or shift by the name of the tensor, as an independent reader has it."""
    return getattr(norm, name).detach().float().reshape(-1) + less if name else torch.tensor(float(less == 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_dyt_has_the_norms_gain_shift_and_dimension(kind: str, dtype: torch.dtype) -> None:
    given = KINDS[kind]
    norm = shaken(given.make(), 0.3, buffers=True).to(dtype)
    model = nn.Sequential(nn.Identity(), norm)
    (found,) = convert_norms(model.to(dtype), alpha_init=0.3)
    assert (found.name, found.alpha, found.error) == ("1", 0.3, None)
    dyt = model[1]
    assert isinstance(dyt, DynamicTanh)
    assert (dyt.hidden_size, dyt.channel_dim) == (SIZE, given.dim)
    assert all(parameter.requires_grad for parameter in dyt.parameters())
    assert (dyt.bias is not None) == (given.shift is not None)
    # Width and channels are equal: a wrong dimension would be silent.
    x = torch.randn(2, SIZE, 5, SIZE).to(dtype)
    shape = [1] * 4
    shape[given.dim] = -1
    gain = values(norm, given.gain, given.less).to(dtype).float()
    expected = torch.tanh(0.3 * x.float()) * (gain.view(shape) if given.gain else 1)
    if given.shift:
        expected = expected + values(norm, given.shift).view(shape)
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(dyt(x).float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("weightless",)])
def test_on_the_meta_device_a_copy_is_tried(kind: str) -> None:
    if kind == "LayerNorm without weight":
        norm = examine(nn.LayerNorm(SIZE, elementwise_affine=False, device="meta"))
    else:
        with torch.device("meta"):
            norm = examine(KINDS[kind].make())
    assert isinstance(norm, Norm)
    assert norm.channel_dim == KINDS[kind].dim
    assert all(each is None or each.is_meta for each in (norm.gain, norm.shift))


def test_the_default_dtype_and_device_do_not_matter() -> None:
    norm = nn.LayerNorm(SIZE)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            built = nn.LayerNorm(SIZE)
            found = [examine(norm), examine(built), examine(WeightlessNorm())]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(isinstance(each, Norm) for each in found), found


# --- what stays -----------------------------------------------------------------------------------


class ScaleNorm(nn.Module):
    """Called a norm, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class GatedRMSNorm(OwnNorm):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x if gate is None else x * F.silu(gate))


class ActivatedLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class EitherLayerNorm(nn.LayerNorm):
    """Channels first for images, and channels last for tokens."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return super().forward(x)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalLayerNorm(OwnNorm):
    """Over channels and time together, as of speech separation; of a matrix that is the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        rest = tuple(range(1, x.dim()))
        y = (x - x.mean(rest, keepdim=True)) / x.var(rest, correction=0, keepdim=True).add(1e-6).sqrt()
        return y * self.weight


class L2Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.square().mean(-1, keepdim=True).rsqrt()


class FrozenBatchNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(SIZE))


class KernelRMSNorm(OwnNorm):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available")


def hooked() -> nn.Module:
    norm = nn.LayerNorm(SIZE)
    norm.register_forward_hook(lambda *_: None)
    return norm


def patched() -> nn.Module:
    norm = nn.LayerNorm(SIZE)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    return norm


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.BatchNorm2d(SIZE), "over the batch, where DyT costs accuracy .*Table 16"),
        (lambda: nn.SyncBatchNorm(SIZE), "over the batch"),
        (FrozenBatchNorm2d, "over the batch"),
        (lambda: nn.GroupNorm(2, SIZE), "groups of channels over all positions"),
        (lambda: nn.InstanceNorm2d(SIZE), "each channel over all positions"),
        (lambda: nn.LocalResponseNorm(2), "its neighbours alone"),
        (lambda: nn.LayerNorm((3, SIZE)), "last 2 dimensions together"),
        (lambda: nn.LayerNorm(1), "a single channel"),
        (ScaleNorm, "computes neither LayerNorm nor RMSNorm of one dimension"),
        (lambda: ActivatedLayerNorm(SIZE), "computes neither"),
        (GatedRMSNorm, "its forward takes gate too"),
        (lambda: EitherLayerNorm(SIZE), "depends on the shape of its input"),
        (GlobalLayerNorm, "depends on the shape of its input"),
        (L2Norm, "has no weight and no normalized_shape"),
        (lambda: OwnNorm(shape=(3, SIZE)), r"other tensors than a weight and a bias .*weight \(3, 12\)"),
        (KernelRMSNorm, "cannot be tried .*no kernel image"),
        (hooked, "has hooks"),
        (patched, "a forward put over its class's"),
    ],
)
def test_a_norm_that_stays_has_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(SIZE), "other": make()})
    other = model["other"]
    report = convert_norms(model)
    assert [each.name for each in report] == ["norm"]
    (left,) = report.left
    assert (left.name, left.kind) == ("other", type(other).__name__)
    assert re.search(reason, left.reason), left.reason
    assert model["other"] is other


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(SIZE, SIZE),
        lambda: nn.PReLU(SIZE),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(SIZE, SIZE)),
        lambda: nn.Sequential(nn.Identity()),
        lambda: DynamicTanh(SIZE),
    ],
)
def test_what_is_no_norm_is_not_mentioned(make: Callable[[], nn.Module]) -> None:
    assert convert_norms(nn.ModuleDict({"norm": nn.LayerNorm(SIZE), "other": make()})).left == []


def test_the_norm_itself_is_not_touched() -> None:
    norm = shaken(LayerNorm2d(SIZE))
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    state = torch.get_rng_state()
    examine(norm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert norm.training
    assert norm.weight.requires_grad
