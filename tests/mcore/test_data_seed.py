"""--data-seed moves the order of the data and not the weights, and a run that goes on keeps it."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dyt.errors import UserError
from megatron_dyt.mcore import recipe_flags

Run = Callable[..., SimpleNamespace]
NORMS = (["--normalization", "RMSNorm"], ["--normalization", "DyT", "--dyt-preset", "unit"])


@pytest.mark.parametrize("norm", NORMS)
def test_data_move_without_the_weights(megatron_run: Run, tiny_llama: list[str], norm: list[str]) -> None:
    def start(*seeds: str) -> tuple[list[torch.Tensor], float]:
        argv = [*tiny_llama, *norm, "--train-iters", "1", "--lr", "0", "--min-lr", "0", *seeds]
        run = megatron_run(argv)
        return [parameter.detach().clone() for parameter in run.model[0].parameters()], run.losses[0]

    weights, loss = start("--seed", "7")
    same_weights, other_loss = start("--seed", "7", "--data-seed", "8")
    assert all(map(torch.equal, weights, same_weights))
    assert loss != other_loss


@pytest.mark.parametrize(("given", "expected"), [(None, 7), (8, 8), (0, 0)])
def test_every_data_set_has_the_seed(
    monkeypatch: pytest.MonkeyPatch,
    given: int | None,
    expected: int,
) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig

    made = BlendedMegatronDatasetConfig.__post_init__
    monkeypatch.setattr(recipe_flags, "parsed_args", lambda: Namespace(data_seed=given))
    monkeypatch.setattr(
        BlendedMegatronDatasetConfig, "__post_init__", recipe_flags.wrap_dataset_post_init(made)
    )
    assert BlendedMegatronDatasetConfig(random_seed=7, sequence_length=4).random_seed == expected


@pytest.mark.parametrize(
    ("now", "then", "message"),
    [
        ((1, None), (2, None), None),  # Megatron's own behaviour: it says nothing
        ((1, 5), (2, 5), None),
        ((5, None), (1, 5), None),
        ((1, 5), (5, None), None),
        ((1, 6), (1, 5), "--data-seed 6 was given, .* seed 5, .* Give --data-seed 5"),
        ((1, None), (1, 5), "--data-seed was not given, .* Give --data-seed 5"),
        ((1, 6), (1, None), "--data-seed 6 was given, .* Give --data-seed 1"),
    ],
)
def test_going_on(now: tuple[int, int | None], then: tuple[int, int | None], message: str | None) -> None:
    args, saved = (Namespace(seed=seed, data_seed=data) for seed, data in (now, then))
    if message is None:
        recipe_flags.check_data_seed(args, saved)
        return
    with pytest.raises(UserError, match=message):
        recipe_flags.check_data_seed(args, saved)


def test_a_checkpoint_of_another_version_has_megatrons_seed_alone() -> None:
    with pytest.raises(UserError, match="seed 1"):
        recipe_flags.check_data_seed(Namespace(seed=1, data_seed=2), Namespace(seed=1))


def test_a_run_does_not_go_on_with_other_data(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path
) -> None:
    argv = [*tiny_llama, "--train-iters", "1", "--data-seed", "5"]
    saves = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "1"]
    megatron_run([*argv, *saves])
    with pytest.raises(UserError, match="--data-seed 6 was given"):
        megatron_run([*argv, *saves, "--data-seed", "6"])
    megatron_run([*argv, *saves, "--data-seed", "6", "--finetune"])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_cannot_take_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match="from 0 to 4294967295"):
        recipe_flags.check(Namespace(data_seed=seed))
