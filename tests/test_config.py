import dataclasses
import math
from argparse import Namespace
from typing import Any, get_args

import pytest
import torch

from megatron_dyt.config import (
    MODEL_ARGS,
    PAPER_ALPHA,
    DyTConfig,
    DyTFields,
    Function,
    paper_alpha,
    parse_embedding_scale,
    resolve_embedding_scale,
    unit_response,
)
from megatron_dyt.errors import UserError
from megatron_dyt.nn import DynamicTanh


@pytest.mark.parametrize(
    ("width", "attn", "other"),
    [(1024, 1.0, 1.0), (2048, 1.0, 0.5), (4096, 0.8, 0.2), (5120, 0.6, 0.15), (8192, 0.2, 0.05)],
)
def test_paper_points_are_exact(width: int, attn: float, other: float) -> None:
    config = DyTConfig.paper(width)
    assert (config.alpha_attn, config.alpha_ffn, config.alpha_final) == (attn, other, other)
    assert config.embedding_scale == "sqrt"
    assert config.bias is False


@pytest.mark.parametrize(("width", "point"), [(64, 1024), (1023, 1024), (8193, 8192), (16384, 8192)])
def test_outside_the_paper_alpha_is_clamped(width: int, point: int) -> None:
    assert paper_alpha(width) == PAPER_ALPHA[point]


@pytest.mark.parametrize(("low", "high"), [(1024, 2048), (2048, 4096), (4096, 5120), (5120, 8192)])
def test_between_two_points_alpha_is_their_geometric_mean_at_the_geometric_middle(
    low: int, high: int
) -> None:
    width = math.sqrt(low * high)
    # A power law through both points.
    expected = [math.sqrt(a * b) for a, b in zip(PAPER_ALPHA[low], PAPER_ALPHA[high], strict=True)]
    assert paper_alpha(round(width)) == pytest.approx(expected, rel=1e-3)


def test_unit_preset_does_not_depend_on_the_width() -> None:
    for width in (64, 4096):
        config = DyTConfig.unit(width)
        assert (config.alpha_attn, config.alpha_ffn, config.alpha_final) == (0.5, 0.25, 0.25)
        assert config.linear_init_std(width) == pytest.approx(width**-0.5)
        assert config.weight_init == "unit"
    assert DyTConfig.paper(4096).linear_init_std(4096) is None


@pytest.mark.parametrize(
    ("rule", "expected"), [("sqrt", 16.0), ("unit", 50.0), ("none", None), ("2.5", 2.5), (3.0, 3.0)]
)
def test_embedding_scale_rules(rule: str | float, expected: float | None) -> None:
    assert resolve_embedding_scale(rule, 256, 0.02) == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["srqt", "0", "-1", "nan", "inf", "", True, None])
def test_bad_embedding_scale_is_refused_with_what_is_allowed(rule: Any) -> None:
    with pytest.raises(UserError, match="sqrt, unit, none or a finite number > 0"):
        parse_embedding_scale(rule)


def test_unit_scale_of_an_embedding_that_starts_at_zero_is_refused() -> None:
    with pytest.raises(UserError, match="positive initial std, got 0"):
        resolve_embedding_scale("unit", 256, 0.0)


@pytest.mark.parametrize("role", ["attn", "ffn", "final", "qk"])
@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf, True])
def test_alpha_must_start_finite_and_positive(role: str, value: float) -> None:
    with pytest.raises(UserError, match=f"--dyt-alpha-init-{role} is .*finite and > 0"):
        DyTConfig.paper(1024, **{f"alpha_{role}": value})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [("function", "tan", "tanh, erf"), ("backend", "cuda", "auto, triton, torch")],
)
def test_unknown_names_are_refused(field: str, value: str, allowed: str) -> None:
    with pytest.raises(UserError, match=allowed):
        DyTConfig.paper(1024, **{field: value})


def test_unknown_preset_and_unknown_field_are_refused() -> None:
    with pytest.raises(UserError, match="--dyt-preset is 'best'; allowed: paper, unit"):
        DyTConfig.preset("best", 64)
    with pytest.raises(UserError, match=r"no field .*'alfa'"):
        DyTConfig.paper(64, alfa=1.0)


def test_overrides_win_over_the_preset() -> None:
    config = DyTConfig.preset("unit", 64, alpha_attn=0.7, bias=True, embedding_scale=3.0)
    assert (config.alpha_attn, config.alpha_ffn, config.bias, config.embedding_scale) == (
        0.7,
        0.25,
        True,
        3.0,
    )


def first_output(config: DyTConfig, role: str) -> torch.Tensor:
    """What a new DyT makes of a standard normal."""
    layer = DynamicTanh(
        256,
        alpha_init=config.alpha(role),
        weight_init=config.initial_weight(role),
        bias=config.bias,
        bias_init=config.initial_bias(role),
        function=config.function,
    )
    return layer(torch.randn(4096, 256, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("function", get_args(Function))
@pytest.mark.parametrize("role", ["attn", "ffn"])
def test_a_unit_input_leaves_with_mean_0_and_std_1(function: str, role: str) -> None:
    config = DyTConfig.unit(64, function=function)
    y = first_output(config, role)
    assert y.mean().item() == pytest.approx(0, abs=5e-3)
    assert y.std().item() == pytest.approx(1.0, rel=5e-3)
    assert config.bias is (function == "sigmoid")


def test_a_sigmoid_without_bias_keeps_its_mean_and_has_rms_1() -> None:
    y = first_output(DyTConfig.unit(64, function="sigmoid", bias=False), "attn")
    assert y.square().mean().sqrt().item() == pytest.approx(1.0, rel=5e-3)
    assert y.mean().item() == pytest.approx(0.97, abs=0.01)


@pytest.mark.parametrize("weight_init", ["one", "unit"])
@pytest.mark.parametrize("function", get_args(Function))
def test_a_bias_starts_at_exactly_0_but_for_a_centered_sigmoid(function: str, weight_init: str) -> None:
    config = DyTConfig.paper(64, function=function, weight_init=weight_init, bias=True)
    assert (config.initial_bias("attn") == 0.0) is ((function, weight_init) != ("sigmoid", "unit"))


def test_unit_response_of_the_identity_is_alpha() -> None:
    assert unit_response("identity", 0.3) == (0.0, pytest.approx(0.3, rel=1e-6))


def test_unit_response_works_while_a_model_is_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        # For a standard normal z, E[erf(a z)^2] = 2/pi asin(2 a^2 / (1 + 2 a^2)); here a = 1/2.
        expected = math.sqrt(2 / math.pi * math.asin(1 / 3))
        assert unit_response("erf", 0.5) == (0.0, pytest.approx(expected, rel=1e-9))


def test_the_papers_weight_starts_at_one() -> None:
    assert DyTConfig.paper(4096).initial_weight("attn") == 1.0


# A value of every field that no preset has, and its name in Megatron's args.
OTHER: dict[str, tuple[str, Any]] = {
    "name": ("dyt_preset", "unit"),
    "alpha_attn": ("dyt_alpha_init_attn", 0.71),
    "alpha_ffn": ("dyt_alpha_init_ffn", 0.31),
    "alpha_final": ("dyt_alpha_init_final", 0.41),
    "alpha_qk": ("dyt_alpha_init_qk", 0.61),
    "bias": ("dyt_bias", True),
    "embedding_scale": ("dyt_embedding_scale", 2.5),
    "function": ("dyt_function", "erf"),
    "weight_init": ("dyt_weight_init", "one"),
    "log_alpha": ("dyt_log_alpha", True),
    "running_scale": ("dyt_running_scale", "all"),
    "freeze_alpha": ("dyt_freeze_alpha", True),
    "alpha_in_grad_norm": ("dyt_alpha_in_grad_norm", False),
    "backend": ("dyt_backend", "torch"),
    "fuse_residual": ("dyt_fuse_residual", False),
}


def test_every_setting_has_its_name_in_args_and_comes_back_from_there() -> None:
    """Checkpoints hold these names."""
    config = DyTConfig(**{field: value for field, (_, value) in OTHER.items()})
    args = config.to_args()
    assert args == dict(OTHER.values()) | {"embedding_scale": 2.5}
    assert DyTConfig.from_args(Namespace(hidden_size=64, **args)) == config
    assert {field.name for field in dataclasses.fields(DyTFields)} == set(args)


def test_what_is_absent_from_args_or_none_is_the_presets() -> None:
    assert DyTConfig.from_args(Namespace(hidden_size=4096)) == DyTConfig.auto(4096)
    given = Namespace(hidden_size=64, dyt_preset="unit", dyt_bias=None, dyt_alpha_init_ffn=0.3)
    assert DyTConfig.from_args(given) == DyTConfig.unit(64, alpha_ffn=0.3)


def test_either_name_of_the_embedding_scale_counts() -> None:
    assert DyTConfig.from_args(Namespace(hidden_size=64, embedding_scale=3.0)).embedding_scale == 3.0


def test_how_a_run_computed_is_no_part_of_its_model() -> None:
    args = Namespace(hidden_size=64, **dict(OTHER.values()))
    others = {"dyt_backend", "dyt_fuse_residual", "dyt_alpha_in_grad_norm"}
    assert {name for name, _ in OTHER.values()} - set(MODEL_ARGS) == others
    args.dyt_backend = "a backend of a later version"
    model = DyTConfig.from_args(args, of_model=True)
    assert (model.backend, model.fuse_residual, model.alpha_ffn) == ("auto", True, 0.31)


@pytest.mark.parametrize(
    ("saved", "where"), [(None, "none"), (False, "none"), (True, "all"), ("mlp", "mlp"), ("all", "all")]
)
def test_a_checkpoint_of_an_earlier_build_keeps_its_running_scale(saved: object, where: str) -> None:
    args = Namespace(hidden_size=64, dyt_preset="auto", dyt_running_scale=saved)
    assert DyTConfig.from_args(args, of_model=True).running_scale == where
    assert DyTConfig.from_args(Namespace(hidden_size=64), of_model=True).running_scale == "none"
