"""Bad values in training: named with layer and role, never applied, never saved."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dyt.config import DyTConfig
from megatron_dyt.errors import TrainingFault
from megatron_dyt.mcore import guard
from megatron_dyt.mcore.guard import SHOWN, Finding, Guard, merge
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.patching import Patches, Replacement, replaced, wrapper

Make = Callable[..., Any]

Run = Callable[..., SimpleNamespace]
Harm = Callable[[Any], None]
DYT = ["--normalization", "DyT", "--dyt-preset", "unit"]
UNCHECKED = "--no-check-for-nan-in-loss-and-grad"
NO_RERUN = ["--rerun-mode", "disabled"]


@pytest.fixture
def harm_in_step(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`harm_in_step(n, harm)`: `harm(model)` happens between backward and update of step n."""

    def start(step: int, harm: Harm) -> None:
        count = 0

        @wrapper
        def around(finalize: Make, model: Any, *args: Any, **options: Any) -> Any:
            nonlocal count
            answer = finalize(model, *args, **options)
            count += 1
            if count == step:
                harm(model[0].module)
            return answer

        patches = Patches()
        patches.apply([Replacement("megatron.training.training", "finalize_model_grads", around)])
        request.addfinalizer(patches.undo)

    return start


def spoil_gradient(value: float) -> Harm:
    def harm(model: Any) -> None:
        model.decoder.layers[1].pre_mlp_layernorm.weight.main_grad[3] = value

    return harm


def push_alpha_down(model: Any) -> None:
    """The next update takes this alpha below zero: Adam moves it by about the learning rate."""
    alpha = model.decoder.layers[0].input_layernorm.alpha
    alpha.data.fill_(1e-5)
    alpha.main_grad.fill_(1.0)


@pytest.mark.parametrize(("clip", "value"), [("1.0", math.nan), ("0", math.inf)])
def test_a_gradient_that_is_not_finite_stops_the_run(
    megatron_run: Run, tiny_llama: list[str], harm_in_step: Callable[..., None], clip: str, value: float
) -> None:
    harm_in_step(1, spoil_gradient(value))
    norm = "nan" if math.isnan(value) else "inf"
    with pytest.raises(TrainingFault) as fault:
        megatron_run([*tiny_llama, *DYT, "--clip-grad", clip])
    assert str(fault.value).startswith(
        f"step 1: the gradient is not finite (norm {norm}) and was not applied. "
        "layer 2 ffn decoder.layers.1.pre_mlp_layernorm.weight (gradient) on rank 0. "
    )


@pytest.mark.parametrize("optimizer", [[], ["--use-distributed-optimizer"]])
def test_a_gradient_of_alpha_that_no_norm_counts_stops_the_run_too(
    megatron_run: Run, tiny_llama: list[str], harm_in_step: Callable[..., None], optimizer: list[str]
) -> None:
    def harm(model: Any) -> None:
        model.decoder.layers[0].input_layernorm.log_alpha.main_grad.fill_(math.inf)

    harm_in_step(1, harm)
    with pytest.raises(TrainingFault, match=r"step 1: the gradient is not finite .*log_alpha \(gradient\)"):
        megatron_run([*tiny_llama, "--normalization", "DyT", "--dyt-preset", "auto", *optimizer])


def test_without_megatrons_check_such_a_step_is_skipped(
    megatron_run: Run, tiny_llama: list[str], harm_in_step: Callable[..., None]
) -> None:
    """Where it clips nothing; it clips in `test_training_goes_on_after_a_skipped_step`."""
    flags = [*tiny_llama, *DYT, UNCHECKED, "--train-iters", "1", "--clip-grad", "0"]
    first = megatron_run([*flags, "--lr", "0", "--min-lr", "0"]).weights()
    harm_in_step(1, spoil_gradient(math.nan))
    run = megatron_run(flags)
    assert (
        "WARNING: step 1: the gradient is not finite (norm nan) and was not applied. layer 2 ffn" in run.log
    )
    assert "number of skipped iterations:   1" in run.log
    torch.testing.assert_close(run.weights(), first, rtol=0, atol=0)


@pytest.mark.needs("detached_mtp")
def test_a_norm_of_mtp_layers_apart_counts_too(
    megatron_run: Run, tiny_llama: list[str], harm_in_step: Callable[..., None]
) -> None:
    """Without clipping, where Megatron computes it only because the guard asks for it."""

    def harm(model: Any) -> None:
        model.mtp.layers[0].enorm.weight.main_grad[3] = math.nan

    harm_in_step(1, harm)
    flags = ["--mtp-num-layers", "1", "--mtp-detach-heads", "--clip-grad", "0"]
    with pytest.raises(TrainingFault, match=r"step 1: .* was not applied\. .*mtp\.layers\.0\.enorm\.weight"):
        megatron_run([*tiny_llama, *DYT, *flags])


def test_training_goes_on_after_a_skipped_step(
    megatron_run: Run, tiny_llama: list[str], harm_in_step: Callable[..., None]
) -> None:
    harm_in_step(2, spoil_gradient(math.nan))
    run = megatron_run([*tiny_llama, *DYT, UNCHECKED, "--train-iters", "6"])
    assert all(map(math.isfinite, run.losses))
    assert run.losses[-1] < run.losses[0]
    assert run.log.count("WARNING: step") == 1


def test_an_rmsnorm_model_is_left_to_megatron(
    megatron_run: Run, tiny_llama: list[str], harm_in_step: Callable[..., None]
) -> None:
    harm_in_step(1, spoil_gradient(math.nan))
    run = megatron_run([*tiny_llama, UNCHECKED, "--train-iters", "2"])
    assert "WARNING: step" not in run.log
    assert math.isnan(run.losses[1])


def test_an_alpha_pushed_below_zero_stops_the_run_before_it_is_saved(
    megatron_run: Run, tiny_llama: list[str], harm_in_step: Callable[..., None], tmp_path: Path
) -> None:
    harm_in_step(2, push_alpha_down)
    saving = ["--save", str(tmp_path), "--save-interval", "1"]
    with pytest.raises(TrainingFault) as fault:
        megatron_run([*tiny_llama, *DYT, *saving])
    text = str(fault.value)
    assert (
        "step 2: an update made alpha <= 0 or not finite: layer 1 attn decoder.layers.0.input_layernorm"
        in text
    )
    assert "was 1e-05" in text
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"


def test_a_negative_alpha_can_be_reported_only_and_is_so_once(
    megatron_run: Run, tiny_llama: list[str], harm_in_step: Callable[..., None]
) -> None:
    harm_in_step(2, push_alpha_down)
    run = megatron_run([*tiny_llama, *DYT, "--dyt-on-bad-alpha", "report", "--train-iters", "3"])
    assert len(run.losses) == 3
    assert float(run.model[0].module.decoder.layers[0].input_layernorm.alpha) < 0
    assert run.log.count("an update made alpha <= 0") == 1


def test_an_alpha_that_is_not_finite_always_stops(
    megatron_run: Run, tiny_llama: list[str], harm_in_step: Callable[..., None]
) -> None:
    """fp32 runs out: the largest number, and an update that adds to it."""

    def harm(model: Any) -> None:
        alpha = model.decoder.final_layernorm.alpha
        alpha.data.fill_(torch.finfo(torch.float32).max)
        alpha.main_grad.fill_(-1.0)

    harm_in_step(1, harm)
    flags = [*tiny_llama, *DYT, "--dyt-on-bad-alpha", "report", "--lr", "1e37", "--clip-grad", "0"]
    with pytest.raises(TrainingFault, match=r"final decoder\.final_layernorm has alpha inf, was 3\.403e\+38"):
        megatron_run(flags)


def test_megatrons_own_check_gets_the_place_as_a_note(megatron_run: Run, tiny_llama: list[str]) -> None:
    """A NaN in a parameter makes the loss NaN, which Megatron's check of the loss raises on."""
    spoiled = Replacement("megatron.training.training", "train", spoiled_start)
    with replaced(spoiled), pytest.raises(RuntimeError, match="the loss on this rank is NaN") as raised:
        megatron_run([*tiny_llama, *DYT, *NO_RERUN])
    (note,) = raised.value.__notes__
    assert note == (
        "megatron_dyt: not finite: layer 1 ffn decoder.layers.0.pre_mlp_layernorm.weight (value) on rank 0."
    )


@wrapper
def spoiled_start(train: Make, forward_step: Any, model: Any, *rest: Any, **options: Any) -> Any:
    with torch.no_grad():
        model[0].module.decoder.layers[0].pre_mlp_layernorm.weight[0] = math.nan
    return train(forward_step, model, *rest, **options)


def test_megatrons_rerun_exit_names_the_place(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron runs the step again, and leaves when it is as bad; the second run finds the site."""
    spoiled = Replacement("megatron.training.training", "train_step", spoiled_second_step)
    with replaced(spoiled), pytest.raises(SystemExit) as ended:
        megatron_run([*tiny_llama, *DYT, "--save", str(tmp_path), "--save-interval", "9"])
    assert ended.value.code == 16
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert line.startswith(
        "megatron_dyt: step 2: not finite: layer 1 ffn decoder.layers.0.pre_mlp_layernorm.weight (value and "
        "gradient) on rank 0; output_layer.weight (gradient) on rank 0; final decoder.final_layernorm.weight "
    )
    assert line.endswith("The first input that was not: layer 2 attn decoder.layers.1.input_layernorm.")


def spoiled_second_step(train_step: Callable[..., Any]) -> Make:
    count = 0

    def step(forward: Any, data: Any, model: Any, *rest: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            with torch.no_grad():
                model[0].module.decoder.layers[0].pre_mlp_layernorm.weight[0] = math.nan
        return train_step(forward, data, model, *rest, **options)

    return step


class Plain:
    """An optimizer that computes no norm in its step, as Megatron's single ones with --clip-grad 0."""

    def __init__(self, norm: float) -> None:
        self.actual, self.updates = norm, 0

    def get_grad_norm(self) -> float:
        return self.actual

    def clip_grad_norm(self, _limit: float) -> float:
        return self.actual

    def step_with_ready_grads(self) -> bool:
        self.updates += 1
        return True

    def step(self) -> tuple[bool, None, None]:
        return self.step_with_ready_grads(), None, None


@pytest.mark.parametrize(("norm", "updates"), [(1.0, 1), (math.nan, 0)])
def test_a_step_that_computes_no_norm_is_given_one(norm: float, updates: int) -> None:
    optimizer = Plain(norm)
    Guard([torch.nn.Linear(2, 2)], optimizer, strict=False).install()
    assert optimizer.step() == (bool(updates), None, None)
    assert optimizer.updates == updates


def test_the_deepest_layer_comes_first_and_the_rest_is_counted() -> None:
    found = {Finding(layer, f"layer {layer}"): [layer, 9] for layer in range(SHOWN + 3)}
    text = merge(found)
    assert text.startswith("layer 8 on rank 8, 9; layer 7 on rank 7, 9; ")
    assert text.endswith("layer 3 on rank 3, 9; and 3 more, in shallower layers.")
    assert merge({}) == "Every single gradient is finite: their norm overflows."


def test_alphas_are_followed_where_the_optimizer_has_them(make_config: Make, build_gpt: Make) -> None:
    """As with Megatron-FSDP: in the step the module gets other parameters, which hold anything by then."""
    config = make_config()
    config.dyt = DyTConfig.unit(32)
    model = build_gpt(config)
    site = model.decoder.final_layernorm
    trained = site.alpha
    updates = iter([0.2, -0.1])

    def step() -> None:
        trained.data.fill_(next(updates))
        site.alpha = torch.nn.Parameter(torch.tensor([-5.0]))

    optimizer = SimpleNamespace(
        get_grad_norm=lambda: 1.0, clip_grad_norm=lambda: 1.0, step_with_ready_grads=lambda: True, step=step
    )
    Guard([model], optimizer).install()
    optimizer.step()
    site.alpha = trained
    with pytest.raises(TrainingFault, match=r"decoder\.final_layernorm has alpha -0\.1, was 0\.2"):
        optimizer.step()


def test_a_logarithm_that_ran_away_is_seen_above_a_floor(make_config: Make) -> None:
    """alpha itself is what the floor is."""
    config = make_config()
    config.dyt = DyTConfig.auto(8)
    norm = DyTNorm(config, 8, role="ffn")
    guard: Any = Guard([torch.nn.Sequential(norm)], SimpleNamespace())
    parameters = [norm.alpha_parameter]
    assert guard._values(parameters).tolist() == [1]
    with torch.no_grad():
        norm.log_alpha.fill_(-math.inf)
    assert norm.effective_alpha().isfinite()
    assert guard._values(parameters).tolist() == [-math.inf]


def test_gradients_that_no_norm_counts_are_read_at_once(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number that the host reads has it wait for the device."""
    config = make_config()
    config.dyt = DyTConfig.auto(8)
    model = torch.nn.Sequential(*(DyTNorm(config, 8, role="ffn") for _ in range(5)))
    model.config = config
    for norm in model:
        norm.alpha_parameter.main_grad = torch.ones(1)  # type: ignore[union-attr]
    guard: Any = Guard([model], SimpleNamespace())
    reads: list[Tensor] = []
    read = Tensor.__bool__
    monkeypatch.setattr(Tensor, "__bool__", lambda self: (reads.append(self), read(self))[1])
    assert guard._uncounted_are_finite()
    assert len(reads) == 1
    model[3].log_alpha.main_grad.fill_(math.nan)
    assert not guard._uncounted_are_finite()


@pytest.mark.needs("training_loop")
@pytest.mark.parametrize(
    ("normalization", "save", "saves"), [("DyT", None, False), ("DyT", "runs", True), ("RMSNorm", None, True)]
)
def test_without_a_place_nothing_is_saved_before_the_exit(
    monkeypatch: pytest.MonkeyPatch, normalization: str, save: str | None, saves: bool
) -> None:
    """Megatron saves before it exits for a NaN, and would end with a TypeError that hides it."""
    import megatron.training

    flags = SimpleNamespace(normalization=normalization, save=save)
    monkeypatch.setattr(megatron.training, "get_args", lambda: flags)
    calls: list[int] = []
    guard.wrap_save(calls.append)(7)
    assert calls == [7] * saves
