"""Norms become DyT and norms again, and a model that cannot be converted stays as it was."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_dyt import DynamicTanh, convert_norms, restore_norms
from megatron_dyt.nn.calibrate import fit
from tests.shaken import shaken

SIZE = 12


def test_places_and_names() -> None:
    shared = nn.LayerNorm(SIZE)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(shared, nn.Linear(SIZE, SIZE), nn.ModuleList([nn.RMSNorm(SIZE)])),
            "b": shared,
            "kept": nn.RMSNorm(SIZE),
            "others": nn.Sequential(nn.BatchNorm1d(SIZE), nn.GroupNorm(2, SIZE), nn.InstanceNorm1d(SIZE)),
        }
    )
    others = list(model["others"])
    alphas = {"a.0": 0.25, "a.2.0": 0.75}
    found = convert_norms(model, alpha_init=alphas.__getitem__, select=lambda name: name != "kept")
    assert {each.name: each.alpha for each in found} == alphas
    assert model["a"][0] is model["b"]
    assert float(model["b"].alpha.detach()) == 0.25
    assert isinstance(model["kept"], nn.RMSNorm)
    assert list(model["others"]) == others


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), "Sequential has no LayerNorm or RMSNorm"),
        (lambda: nn.LayerNorm(4), "replaces the norms inside a model"),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm((3, 4))),
            r"left 0 \(BatchNorm1d\): it norm.* left 1 \(LayerNorm\): it normalizes the last 2 dimensions",
        ),
    ],
)
def test_what_cannot_be_converted(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_norms(make())


def test_wrong_alpha() -> None:
    with pytest.raises(ValueError, match=r"alpha_init is -1"):
        convert_norms(nn.Sequential(nn.RMSNorm(4)), alpha_init=-1.0)


def test_what_was_left_is_said_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(SIZE) for _ in range(6)), nn.GroupNorm(2, SIZE), nn.RMSNorm(SIZE))
    logger = logging.getLogger("megatron_dyt.nn.convert")
    logger.addHandler(caplog.handler)
    report = convert_norms(model)
    logger.removeHandler(caplog.handler)
    assert [each.name for each in report.left] == [str(index) for index in range(7)]
    records = dict.fromkeys(caplog.records)  # once, whether or not the logger propagates
    lines = [record.getMessage() for record in records if record.levelno == logging.WARNING]
    assert len(lines) == 2
    assert lines[0].startswith("left 0, 1, 2, 3 and 2 more (BatchNorm1d): it normalizes over the batch")
    assert lines[1].startswith("left 6 (GroupNorm): ")


# --- kinds ----------------------------------------------------------------------------------------


def test_kinds_are_converted_as_asked() -> None:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm1d(SIZE), nn.LayerNorm(SIZE), nn.RMSNorm(SIZE), nn.GroupNorm(2, SIZE)
        )

    for kinds, names in (
        (("layernorm",), ["1"]),
        (["rmsnorm"], ["2"]),
        ({"batchnorm"}, ["0"]),
        (("layernorm", "rmsnorm", "batchnorm"), ["0", "1", "2"]),
    ):
        converted = model()
        report = convert_norms(converted, kinds=kinds)
        assert [each.name for each in report] == names
        assert [isinstance(each, DynamicTanh) for each in converted] == [str(i) in names for i in range(4)]
        # A BatchNorm that was not asked for is named, as ever.
        assert [each.name for each in report.left] == (["3"] if "batchnorm" in kinds else ["0", "3"])
    with pytest.raises(ValueError, match=r"kinds has \['groupnorm'\]; allowed are layernorm, rmsnorm and"):
        convert_norms(model(), kinds=("groupnorm",))
    with pytest.raises(ValueError, match="Sequential has no RMSNorm or BatchNorm to convert"):
        convert_norms(nn.Sequential(nn.LayerNorm(4)), kinds=("rmsnorm", "batchnorm"))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (7,)), (nn.BatchNorm2d, (5, 3))]
)
def test_batch_norm(norm: Any, shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Identity(), shaken(norm(SIZE, affine=affine)))
    x = torch.randn(8, SIZE, *shape) * torch.linspace(0.5, 2, SIZE).view(SIZE, *[1] * len(shape)) + 0.3
    model(x)  # It has seen something now.
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target = model.eval()(x).detach()
    gain, shift = (model[1].weight, model[1].bias) if affine else (torch.ones(SIZE), torch.zeros(SIZE))
    convert_norms(model, kinds=("batchnorm",), alpha_init=0.7)
    channels = [SIZE, *[1] * len(shape)]
    assert model[1].bias is not None or not affine
    bias = shift.view(channels)
    torch.testing.assert_close(model(x), gain.view(channels) * torch.tanh(0.7 * x) + bias)
    restore_norms(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (found,) = convert_norms(model, x, kinds=("batchnorm",))
    # In evaluation BatchNorm is a line for each channel; the fit has one alpha for all.
    assert found.error is not None
    assert found.error < 0.01
    torch.testing.assert_close(model(x), target, rtol=0, atol=0.2 * float(target.abs().max()))


def test_what_select_leaves_out_is_not_mentioned() -> None:
    model = nn.Sequential(nn.BatchNorm1d(SIZE), nn.RMSNorm(SIZE))
    assert convert_norms(model, select=lambda name: name == "1").left == []


def test_norms_that_share_a_weight_stay() -> None:
    model = nn.ModuleDict({name: nn.RMSNorm(SIZE) for name in ("a", "b", "c")})
    model["b"].weight = model["a"].weight
    report = convert_norms(model)
    assert [each.name for each in report] == ["c"]
    assert [each.reason for each in report.left] == ["it shares a tensor with b", "it shares a tensor with a"]


@pytest.mark.parametrize("around", [False, True])
def test_a_norm_without_parameters_follows_its_neighbours(around: bool) -> None:
    inner = nn.ModuleDict({"norm": nn.LayerNorm(SIZE, elementwise_affine=False)})
    if not around:
        inner["linear"] = nn.Linear(SIZE, SIZE)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), inner).to(torch.bfloat16)
    convert_norms(model)
    assert inner["norm"].weight.dtype == torch.bfloat16


# --- undo, save and load --------------------------------------------------------------------------


def mixed_model() -> nn.Module:
    torch.manual_seed(3)
    shared = nn.RMSNorm(SIZE)
    return shaken(
        nn.Sequential(nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE), shared, nn.Sequential(shared, nn.Tanh()))
    )


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, modules: list[nn.Module], state: dict[str, Tensor]) -> None:
    assert list(model.modules()) == modules
    now = bits(model)
    assert list(now) == list(state)
    assert all(torch.allclose(now[name], each, 0, 0, equal_nan=True) for name, each in state.items())


@pytest.mark.parametrize("calibrated", [False, True])
def test_restored_it_is_the_same_model_to_the_bit(calibrated: bool) -> None:
    model = mixed_model()
    modules, state = list(model.modules()), bits(model)
    convert_norms(model, torch.randn(4, SIZE) if calibrated else None)
    assert len(bits(model)) > len(state)
    torch.nn.init.normal_(model[1].weight)
    assert restore_norms(model) == ["1", "2"]
    assert_same(model, modules, state)


def test_a_converted_model_is_copied_and_pickled_with_its_norms() -> None:
    model = mixed_model()
    state = bits(model)
    convert_norms(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        restore_norms(other)
        assert_same(other, list(other.modules()), state)
        assert other[1] is not model[1].replaces


def test_restored_norms_follow_the_models_dtype_and_mode() -> None:
    model = mixed_model()
    convert_norms(model)
    model.to(torch.bfloat16).eval()
    restore_norms(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())


def test_only_what_was_converted_can_be_restored() -> None:
    with pytest.raises(ValueError, match="has no DyT that convert_norms put in the place of a norm"):
        restore_norms(nn.Sequential(DynamicTanh(SIZE), nn.RMSNorm(SIZE)))
    with torch.device("meta"):
        model = nn.Sequential(nn.RMSNorm(SIZE))
    convert_norms(model)
    model.to_empty(device="cpu")
    with pytest.raises(ValueError, match="converted on the meta device"):
        restore_norms(model)


def test_a_second_conversion_leaves_the_first_one_alone() -> None:
    model = mixed_model()
    convert_norms(model, select=lambda name: name == "1")
    first = model[1]
    with pytest.raises(ZeroDivisionError):
        convert_norms(model, alpha_init=lambda name: 1 / 0)
    assert model[1] is first
    convert_norms(model)
    assert model[1] is first
    assert isinstance(model[2], DynamicTanh)
    assert restore_norms(model) == ["1", "2"]


def test_a_state_dict_says_what_to_convert_before_it_is_loaded() -> None:
    model, fresh = mixed_model(), mixed_model()
    convert_norms(model, torch.randn(4, SIZE), select=lambda name: name != "2")
    state = bits(model)
    convert_norms(fresh, bias=True, select=lambda name: f"{name}.alpha" in state)
    fresh.load_state_dict(state)
    x = torch.randn(5, SIZE)
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(RuntimeError, match=r"1\.alpha"):
        mixed_model().load_state_dict(state)


# --- calibration ----------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Residual blocks, as in a transformer: norm, linear layer, tanh, added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(shaken(nn.RMSNorm(SIZE)) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + 2 * torch.tanh(linear(norm(x)))
        return x


@pytest.fixture
def blocks() -> Blocks:
    torch.manual_seed(4)
    return Blocks()


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(8, 20, SIZE, generator=generator) * 3


@pytest.mark.parametrize("sequential", [True, False])
def test_each_site_is_fitted_to_its_norm(blocks: Blocks, sequential: bool) -> None:
    before = copy.deepcopy(blocks).requires_grad_(False)
    report = convert_norms(blocks, inputs(), sequential=sequential, refine=False)
    old = new = inputs()
    for index, found in enumerate(report):
        expected = before.norms[index](old)
        best = fit(new if sequential else old, expected)
        dyt = blocks.norms[index]
        assert found.error == pytest.approx(best.error, rel=1e-3)
        assert found.alpha == pytest.approx(float(best.alpha), rel=1e-3)
        assert torch.allclose(dyt.weight, best.weight, rtol=1e-3)
        assert torch.allclose(dyt.bias, best.bias, atol=1e-4)
        old = old + 2 * torch.tanh(before.linears[index](expected))
        new = new + 2 * torch.tanh(before.linears[index](dyt(new).detach()))


def test_calibration_brings_the_output_near(blocks: Blocks) -> None:
    target, errors = blocks(inputs()).detach(), {}
    ways: dict[str, dict[str, Any]] = {
        "none": {"calibration": None},
        "alone": {"sequential": False},
        "in sequence": {},
    }
    for way, arguments in ways.items():
        model = copy.deepcopy(blocks)
        convert_norms(model, **({"calibration": inputs()} | arguments))
        errors[way] = float((model(inputs()).detach() - target).square().mean())
    assert errors["in sequence"] < 0.2 * errors["none"]
    assert errors["alone"] < 0.2 * errors["none"]


def test_alpha_by_channel_and_a_function_of_ones_own(blocks: Blocks) -> None:
    models: list[Blocks] = []
    reports = []
    for groups in (1, "channels"):
        models.append(copy.deepcopy(blocks))
        reports.append(
            convert_norms(models[-1], inputs(), alpha_groups=groups, function=torch.atan, sequential=False)
        )
    # Of the same inputs.
    assert all(many.error < one.error for one, many in zip(*reports, strict=True))
    for norm, found in zip(models[1].norms, reports[1], strict=True):
        assert norm.function is torch.atan
        assert norm.alpha.shape == (SIZE,)
        assert found.alpha == pytest.approx(float(norm.alpha.mean()))


def test_groups_that_do_not_divide_a_norm_change_nothing(blocks: Blocks) -> None:
    modules = list(blocks.modules())
    with pytest.raises(ValueError, match=f"alpha has 5 values for {SIZE} channels"):
        convert_norms(blocks, alpha_groups=5)
    assert list(blocks.modules()) == modules


def test_without_a_bias(blocks: Blocks) -> None:
    convert_norms(blocks, inputs(), bias=False)
    assert all(norm.bias is None for norm in blocks.norms)


def stop(x: Tensor) -> None:
    raise KeyboardInterrupt("as if by Ctrl-C")


class LayerNorm2d(nn.LayerNorm):
    """timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: setattr(model, "head", nn.RMSNorm(SIZE)), "does not reach head; give a batch"),
        (lambda model: setattr(model, "forward", stop), "as if by Ctrl-C"),
        (lambda model: model.linears[1].weight.data.fill_(float("nan")), "not finite"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(
    blocks: Blocks, spoil: Callable[[Blocks], None], message: str
) -> None:
    spoil(blocks)
    modules, state = list(blocks.modules()), bits(blocks)
    with pytest.raises((ValueError, KeyboardInterrupt), match=message):
        convert_norms(blocks, inputs())
    assert_same(blocks, modules, state)
    assert all(module.training for module in modules)


class Wrapped(nn.Module):
    """A norm, and how its input is made of the batch."""

    def __init__(self, arrange: Callable[[Tensor], Tensor], norm: nn.Module) -> None:
        super().__init__()
        self.arrange, self.norm = arrange, norm

    def forward(self, x: Tensor) -> Tensor:
        # As Mamba's blocks do it.
        return self.norm(self.arrange(x).to(self.norm.weight.dtype))


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1),  # length first
        lambda x: x.flatten(0, 1),  # sequences of tokens in a row
        lambda x: x.unflatten(1, (4, 5)).permute(1, 2, 0, 3),
    ],
)
@pytest.mark.parametrize("sequential", [True, False])
def test_the_sequences_are_found_wherever_they_stand(
    arrange: Callable[[Tensor], Tensor], sequential: bool
) -> None:
    model = Wrapped(arrange, shaken(nn.RMSNorm(SIZE)))
    expected = model(inputs()).detach()
    (found,) = convert_norms(model, inputs(), sequential=sequential, refine=False)
    best = fit(arrange(inputs()), expected)
    assert (found.alpha, found.error) == pytest.approx((float(best.alpha), best.error), rel=1e-5)
    torch.testing.assert_close(model.norm.weight.detach(), best.weight)


def with_a_large_channel(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x[..., :1], 500.0), x[..., 1:]], -1)


@pytest.mark.parametrize("scale", [1.0, 500.0])
@pytest.mark.parametrize("arrange", [lambda x: x, lambda x: x.transpose(0, 1)])
def test_a_channel_that_is_large_everywhere_hides_no_sequences(
    arrange: Callable[[Tensor], Tensor], scale: float
) -> None:
    """As trained transformers have them: against it all tokens look the same."""
    batch = inputs()
    batch[..., 0] = scale
    model = Wrapped(arrange, shaken(nn.RMSNorm(SIZE)))
    expected = model(batch).detach()
    (found,) = convert_norms(model, batch, refine=False)
    assert found.error == pytest.approx(fit(arrange(batch), expected).error, rel=1e-4)


def test_channels_first_is_fitted_along_its_channels() -> None:
    norm = shaken(LayerNorm2d(SIZE))
    model = Wrapped(lambda x: x.unflatten(1, (4, 5)).permute(0, 3, 1, 2), norm)
    expected = model(inputs()).detach()
    (found,) = convert_norms(model, inputs(), refine=False)
    best = fit(inputs().unflatten(1, (4, 5)), expected.permute(0, 2, 3, 1))
    assert found.error == pytest.approx(best.error, rel=1e-5)
    torch.testing.assert_close(model.norm.weight.detach(), best.weight)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x: x.transpose(0, 1).flatten(0, 1),  # the first tokens of all sequences, then the second ones
        lambda x: torch.arange(5.0 * SIZE).view(5, SIZE),  # nothing of the batch
        lambda x: with_a_large_channel(x.transpose(0, 1).flatten(0, 1)),
    ],
)
def test_a_site_without_a_dimension_of_sequences_is_refused(arrange: Callable[[Tensor], Tensor]) -> None:
    model = Wrapped(arrange, nn.RMSNorm(SIZE))
    with pytest.raises(ValueError, match="cannot tell the sequences in the input of norm, of shape"):
        convert_norms(model, inputs())
    assert isinstance(model.norm, nn.RMSNorm)


@pytest.mark.parametrize("batch", [None, torch.randn(16, 5, SIZE)])
def test_a_frozen_norm_becomes_a_frozen_dyt(batch: Tensor | None) -> None:
    model = nn.Sequential(nn.LayerNorm(SIZE), nn.Linear(SIZE, SIZE), nn.LayerNorm(SIZE))
    model[0].requires_grad_(False)
    convert_norms(model, batch)
    assert not any(parameter.requires_grad for parameter in model[0].parameters())
    assert all(parameter.requires_grad for parameter in model[2].parameters())


class ActivatedBatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_batch_norm_that_does_more_stays() -> None:
    model = nn.Sequential(nn.BatchNorm1d(SIZE), ActivatedBatchNorm(SIZE))
    report = convert_norms(model, kinds=("batchnorm",))
    assert [each.name for each in report] == ["0"]
    (left,) = report.left
    assert left.name == "1"
    assert "a forward of its own" in left.reason
