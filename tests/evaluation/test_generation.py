"""Generation against one full forward pass per token."""

import pytest
import torch

from megatron_dyt.errors import UserError
from megatron_dyt.evaluation import generation
from megatron_dyt.evaluation.forward import Forward
from megatron_dyt.evaluation.generation import Generator
from megatron_dyt.evaluation.ranks import Ranks

from .toy import VOCABULARY, ToyModel, ranks_one_after_the_other


def toy_generator(batch_tokens: int = 100, ranks: Ranks | None = None) -> Generator:
    forward = Forward(ToyModel(), vocab_size=VOCABULARY, device=torch.device("cpu"))
    return Generator(forward, batch_tokens=batch_tokens, ranks=ranks)


def test_greedy_generation_equals_one_forward_pass_a_token() -> None:
    model = ToyModel()
    prompts = [[4, 5, 6], [7], [1, 9, 9, 9]]
    expected = []
    for prompt in prompts:
        row = list(prompt)
        for _ in range(5):
            row.append(int(model.logits(row).argmax()))
        expected.append(row[len(prompt) :])
    full = toy_generator().generate(prompts, max_new=5, max_length=50, done=lambda new: False)
    assert full == expected
    # Stopped rows stay as they are while the others go on.
    stop = expected[0][1]
    stopped = toy_generator().generate(prompts, max_new=5, max_length=50, done=lambda new: new[-1] == stop)
    for new, whole in zip(stopped, expected, strict=True):
        assert new == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert len(stopped[0]) == 2


def test_sampling_depends_on_the_seed_and_not_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[4, 5, 6], [7], [1, 9]]

    def sample(batch_tokens: int) -> list[list[int]]:
        return toy_generator(batch_tokens).generate(
            prompts, max_new=8, max_length=50, done=lambda new: False, temperature=1.5
        )

    first = sample(1000)
    assert sample(1) == first
    monkeypatch.setattr(generation, "ROUND", 1)
    assert sample(1) == first
    assert max(token for new in first for token in new) < VOCABULARY
    monkeypatch.setattr(generation, "SEED", 1)
    assert sample(1000) != first


def test_ranks_share_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[4, 5], [6], [7, 8, 9]]
    whole = toy_generator(1).generate(prompts, max_new=3, max_length=50, done=lambda new: False)
    parts: list[dict[int, list[int]]] = []
    for ranks in ranks_one_after_the_other(monkeypatch, merge=parts.append):
        # What the other rank would send is missing in the end.
        with pytest.raises(KeyError):
            toy_generator(1, ranks).generate(prompts, max_new=3, max_length=50, done=lambda new: False)
    first, second = parts
    assert not set(first) & set(second)
    assert [(first | second)[i] for i in range(3)] == whole


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_nan_generates_nothing(temperature: float) -> None:
    generator = toy_generator()
    with torch.no_grad():
        next(generator.forward.model.parameters())[5] = float("nan")
    options = {"max_new": 2, "max_length": 50, "done": lambda new: False, "temperature": temperature}
    with pytest.raises(UserError, match="not finite"):
        generator.generate([[4, 5]], **options)
