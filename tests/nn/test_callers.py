"""Code that reads a norm's weight to compute the norm itself never gets a DyT's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dyt import DynamicTanh, convert_norms, restore_norms

SIZE = 16


class Encoder(nn.Module):
    """PyTorch's own layers, which take fused kernels when they evaluate, with arguments that allow these."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        layer = nn.TransformerEncoderLayer(
            SIZE, 2, 24, dropout=0.0, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(
            layer, 2, norm=nn.LayerNorm(SIZE), enable_nested_tensor=not norm_first
        )
        for name, parameter in self.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, mean=1.0)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


@pytest.mark.parametrize("padding", [None, PADDING])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_evaluates_as_it_trains(norm_first: bool, padding: Tensor | None) -> None:
    model, x = Encoder(norm_first), torch.randn(2, 5, SIZE)
    convert_norms(model)
    expected = model.train()(x, padding)
    with torch.no_grad():
        found = model.eval()(x, padding)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_restored_encoder_has_its_fused_kernels_again(
    norm_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Encoder(norm_first).eval(), torch.randn(2, 5, SIZE)
    calls: list[bool] = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(True) or fused(*a))
    attributes = [dict(vars(module)) for module in model.modules()]
    with torch.no_grad():
        before = model(x, PADDING)
        assert len(calls) == 2
        convert_norms(model, {"x": x, "padding": PADDING})
        model(x, PADDING)
        assert len(calls) == 2
        restore_norms(model)
        assert torch.equal(model(x, PADDING), before)
    assert len(calls) == 4
    assert [set(vars(module)) for module in model.modules()] == [set(each) for each in attributes]


def test_an_encoder_whose_norms_stay_keeps_its_fused_kernels() -> None:
    model = nn.ModuleList([Encoder(False), nn.RMSNorm(SIZE)])
    convert_norms(model, select=lambda name: name == "1")
    layer = model[0].encoder.layers[0]
    assert layer.activation_relu_or_gelu == 2
    assert model[0].encoder.use_nested_tensor


class FusedBlock(nn.Module):
    """As mamba-ssm's: add and norm in one kernel, which gets the norm's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.layer_norm(x, (SIZE,), self.norm.weight, self.norm.bias, self.norm.eps))


class IndirectBlock(FusedBlock):
    def forward(self, x: Tensor) -> Tensor:
        return self.add_and_norm(x)

    def add_and_norm(self, x: Tensor) -> Tensor:
        scale = self.norm.weight
        return self.linear(F.layer_norm(x, (SIZE,), scale))


class AliasBlock(FusedBlock):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return self.linear(F.layer_norm(x, (SIZE,), norm.weight))


class DtypeBlock(FusedBlock):
    """As transformers' Mamba: what it wants of the weight is the dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.to(self.norm.weight.dtype)))

    def reset(self) -> None:
        self.norm = nn.LayerNorm(SIZE, eps=self.norm.eps)


@pytest.mark.parametrize(
    ("block", "reads"),
    [*((block, "norm.weight") for block in (FusedBlock, IndirectBlock, AliasBlock)), (DtypeBlock, None)],
)
def test_a_norm_whose_weight_is_handed_on_stays(block: type[nn.Module], reads: str | None) -> None:
    model = nn.Sequential(block(), nn.LayerNorm(SIZE))
    report = convert_norms(model)
    assert isinstance(model[1], DynamicTanh)
    assert [each.reason for each in report.left] == (
        [f"{block.__name__}.forward reads {reads} and may compute the norm without calling it"]
        if reads
        else []
    )
    assert isinstance(model[0].norm, nn.LayerNorm if reads else DynamicTanh)


def test_a_class_without_source_is_taken_as_it_is() -> None:
    made: dict[str, type[nn.Module]] = {"nn": nn}  # type: ignore[dict-item]
    exec("class Made(nn.Sequential):\n    def forward(self, x):\n        return self[0](x)", made)
    assert len(convert_norms(made["Made"](nn.LayerNorm(SIZE)))) == 1
