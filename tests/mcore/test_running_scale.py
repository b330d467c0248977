"""alpha over a running average of the input's rms: what is averaged, when, and what is done with it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_dyt.config import DyTConfig, Role
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import running_scale
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.residual import DeferredSum

Make = Callable[..., Any]


@pytest.fixture
def make_norm(make_config: Make) -> Callable[..., DyTNorm]:
    def make(running: str = "mlp", role: Role = "ffn", **overrides: Any) -> DyTNorm:
        config = make_config(**overrides)
        config.dyt = DyTConfig.auto(8, running_scale=running)
        return DyTNorm(config, 8, role=role)

    return make


def average(norm: DyTNorm) -> float:
    assert norm.input_rms is not None
    return float(norm.input_rms)


def set_average(norm: DyTNorm, value: float) -> None:
    assert norm.input_rms is not None
    norm.input_rms.fill_(value)


def test_a_new_site_is_a_plain_dyt(make_norm: Make) -> None:
    norm, plain = make_norm(), make_norm(running="none")
    x = torch.randn(5, 8)
    assert torch.allclose(norm(x), plain(x))
    assert plain.input_rms is None
    assert set(norm.state_dict()) - set(plain.state_dict()) == {"input_rms", "alpha_floor"}


def test_alpha_is_per_unit_of_the_average(make_norm: Make) -> None:
    norm, plain = make_norm(), make_norm(running="none")
    set_average(norm, 4.0)
    x = torch.randn(5, 8)
    ours, theirs = x.clone().requires_grad_(), (x / 4).requires_grad_()
    norm(ours).square().sum().backward()
    plain(theirs).square().sum().backward()
    assert float(norm.effective_alpha()) == pytest.approx(0.25)
    assert torch.allclose(norm(x), plain(x / 4))
    # A constant: none of the gradient goes through it.
    assert torch.allclose(ours.grad, theirs.grad / 4)
    # The floor's part of alpha is none of the logarithm's.
    assert torch.allclose(norm.log_alpha.grad, 0.85 * plain.log_alpha.grad)


def test_alpha_does_not_fall_below_its_floor(make_norm: Make) -> None:
    norm = make_norm()
    set_average(norm, 4.0)
    with torch.no_grad():
        norm.log_alpha -= 100
    assert float(norm.effective_alpha()) == pytest.approx(0.15 / 4)
    assert make_norm(running="none").alpha_floor is None


@pytest.mark.parametrize("role", ["attn", "final", "qk"])
def test_other_sites_have_one_only_where_all_have(make_norm: Make, role: Role) -> None:
    norm, plain, everywhere = (make_norm(role=role, running=where) for where in ("mlp", "none", "all"))
    assert norm.state_dict().keys() == plain.state_dict().keys()
    assert norm.log_alpha == plain.log_alpha
    assert set(everywhere.state_dict()) - set(plain.state_dict()) == {"input_rms"}


def test_where_all_sites_have_one_the_logarithm_is_slow_and_has_no_floor(make_norm: Make) -> None:
    norm, plain = make_norm(running="all"), make_norm(running="none")
    x = torch.randn(5, 8)
    for each in (norm, plain):
        each(x).square().sum().backward()
    assert torch.allclose(norm.log_alpha.grad / 2, plain.log_alpha.grad / 10)
    assert norm.alpha_floor is None


def test_a_frozen_alpha_has_none() -> None:
    assert DyTConfig.auto(8, freeze_alpha=True).running_scale == "none"
    assert DyTConfig.auto(8, freeze_alpha=True, running_scale="mlp").running_scale == "mlp"


def test_a_step_moves_the_average_by_a_tenth_towards_what_was_seen(make_norm: Make) -> None:
    norm = make_norm()
    first, second = 3 * torch.randn(40, 2, 8), 5 * torch.randn(20, 2, 8)
    norm(first)
    norm(second)
    running_scale.update([norm])
    rms = float(torch.cat([first, second]).square().mean().sqrt())
    assert average(norm) == pytest.approx(0.9 + 0.1 * rms, rel=1e-5)
    assert norm.seen.tolist() == [0, 0]
    for _ in range(200):
        norm(first)
        running_scale.update([norm])
    assert average(norm) == pytest.approx(float(first.square().mean().sqrt()), rel=1e-4)


def test_what_a_capture_of_cuda_graphs_ran_layers_on_is_forgotten(make_norm: Make) -> None:
    """Transformer Engine's is of ones, between two steps; Megatron then resets what it has counted itself."""
    from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors

    norm = make_norm()
    norm(torch.ones(40, 2, 8))
    reset = running_scale.wrap_reset(reset_model_temporary_tensors)
    config = SimpleNamespace(moe_router_enable_expert_bias=False, moe_router_load_balancing_type="none")
    reset(config, [norm])
    assert norm.seen.tolist() == [0, 0]
    reset(config, [nn.Linear(2, 2)])


def test_within_a_step_it_is_constant(make_norm: Make) -> None:
    norm = make_norm()
    x = 3 * torch.randn(40, 2, 8)
    assert torch.equal(norm(x), norm(x))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 0.0])
def test_what_has_no_rms_leaves_it_alone(make_norm: Make, bad: float) -> None:
    norm = make_norm()
    set_average(norm, 2.0)
    running_scale.update([norm])
    assert average(norm) == 2.0
    norm(torch.full((4, 8), bad))
    running_scale.update([norm])
    assert average(norm) == 2.0
    assert norm.seen.tolist() == [0, 0]


def test_only_training_is_seen_and_a_recomputed_pass_once(make_norm: Make) -> None:
    norm = make_norm()
    x = torch.randn(4, 8, requires_grad=True)
    torch.utils.checkpoint.checkpoint(norm, x, use_reentrant=True).sum().backward()
    assert norm.seen[1] == x.numel()
    norm.eval()
    norm(x)
    assert norm.seen[1] == x.numel()


def test_a_sum_is_seen_and_left_for_the_kernel(make_norm: Make) -> None:
    norm = make_norm()
    x, residual = torch.randn(2, 6, 3, 8)
    y, total = norm(DeferredSum(x, residual))
    assert torch.equal(total, x + residual)
    assert torch.equal(y, norm.eval()(total))
    assert float(norm.seen[0]) == pytest.approx(float(total.square().sum()), rel=1e-6)


def test_a_long_sequence_is_sampled_alike_however_it_is_split(make_norm: Make) -> None:
    x = torch.randn(640, 2, 8)
    whole = make_norm()
    whole(x)
    assert whole.seen[1] == 64 * 2 * 8
    parts = torch.zeros(2)
    for part in x.chunk(2):
        norm = make_norm(tensor_model_parallel_size=2, sequence_parallel=True)
        norm(part)
        parts += norm.seen
    assert torch.allclose(parts, whole.seen)


def test_the_average_stays_fp32_in_a_model_of_16_bits(make_norm: Make) -> None:
    norm = make_norm().bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    norm(torch.randn(4, 8, dtype=torch.bfloat16))
    running_scale.update([norm])
    assert norm.input_rms.dtype == norm.seen.dtype == torch.float32
    assert norm.input_rms.bfloat16().float() != norm.input_rms


def test_a_cast_leaves_values_as_they_are(make_norm: Make) -> None:
    norm = make_norm()
    set_average(norm, 3.14159)
    floor = norm.alpha_floor.clone()
    norm.bfloat16()
    assert average(norm) == pytest.approx(3.14159, rel=1e-7)
    assert torch.equal(norm.alpha_floor, floor)


def test_a_frozen_layer_keeps_its_average(make_norm: Make) -> None:
    norm = make_norm().requires_grad_(False)
    norm(torch.full((4, 8), 3.0, requires_grad=True))
    running_scale.update([norm])
    assert average(norm) == 1.0


def test_nothing_has_been_seen_where_a_model_from_the_meta_device_is_loaded(make_norm: Make) -> None:
    saved = make_norm().state_dict()
    norm = make_norm().to("meta")
    # Fills what is not initialized with nan.
    torch.use_deterministic_algorithms(True)
    try:
        norm.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    norm.load_state_dict(saved)
    assert norm.seen.tolist() == [0, 0]


def test_it_survives_the_meta_device_and_starts_anew(make_norm: Make) -> None:
    norm = make_norm().to("meta").to_empty(device="cpu")
    norm.reset_parameters()
    assert average(norm) == 1.0
    assert float(norm.alpha_floor) == pytest.approx(0.15)
    assert norm.seen.tolist() == [0, 0]


def test_a_model_without_such_sites_has_nothing_to_update(make_norm: Make) -> None:
    running_scale.update([make_norm(running="none"), nn.Linear(2, 2)])


@pytest.mark.parametrize(("exits", "after"), [(True, 1.0), (False, 1.2)])
def test_a_step_that_is_left_for_a_rerun_leaves_the_average_as_it_was(
    make_norm: Make, exits: bool, after: float
) -> None:
    norm = make_norm()
    norm(torch.full((4, 8), 3.0))
    running_scale.update([norm])
    leave = running_scale.wrap_exit(lambda machine: (exits, exits, 16 * exits))
    assert leave(None) == (exits, exits, 16 * exits)
    assert average(norm) == pytest.approx(after)


def test_ranks_without_groups_are_told(make_norm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = make_norm()
    norm(torch.randn(4, 8))
    monkeypatch.setattr("megatron_dyt.world.size", lambda: 2)
    monkeypatch.setattr("megatron.core.parallel_state.model_parallel_is_initialized", lambda: False)
    with pytest.raises(UserError, match="--dyt-running-scale none"):
        running_scale.update([norm])


def test_a_models_own_groups_are_taken(make_norm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(make_norm())
    model[0](torch.full((4, 8), 3.0))
    asked = []
    monkeypatch.setattr("megatron_dyt.world.size", lambda: 2)
    monkeypatch.setattr(running_scale.dist, "all_reduce", lambda sums, group: asked.append(group))
    model.pg_collection = SimpleNamespace(tp="tensor", dp_cp="data", tp_dp_cp=None)
    running_scale.update([model])
    model.pg_collection.tp_dp_cp = "both"
    running_scale.update([model])
    assert asked == ["tensor", "data", "both"]
