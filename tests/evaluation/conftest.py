"""Tiny trained checkpoints with a real tokenizer, made once a session inside the test process."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_dyt import cpu
from tests.conftest import forget_run, start_alone
from tests.license_tokenizer import write_tokenizer_model

VOCABULARY = 400  # Megatron pads it to 512.
SEQUENCE = 48
# Flags that a loader which restores too few of the stored ones would get wrong.
UNUSUAL = "--norm-epsilon 1e-2 --rotary-base 500 --rotary-percent 0.5 --qk-layernorm"


@dataclass(frozen=True)
class Trained:
    """A checkpoint directory, and the model that was saved there."""

    directory: Path
    tokenizer: Path
    model: torch.nn.Module


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="session")
def tokenizer_model(home: Path) -> Path:
    return write_tokenizer_model(home / "tokenizer.model", VOCABULARY)


_trained: dict[tuple[str, str], Trained] = {}


@pytest.fixture
def trained(
    megatron_run: Callable[[list[str]], SimpleNamespace],
    tiny_llama: list[str],
    tokenizer_model: Path,
    home: Path,
) -> Callable[..., Trained]:
    """`trained("DyT")`: a checkpoint at iterations 2 and 4, trained on its first use."""

    def train(norm: str, unusual: str = UNUSUAL) -> Trained:
        key = norm, unusual
        if key not in _trained:
            directory = home / f"{norm}{len(_trained)}"
            flags = f"--normalization {norm} --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE}"
            flags += f" --tokenizer-type SentencePieceTokenizer --tokenizer-model {tokenizer_model}"
            flags += f" --save {directory} --save-interval 2 --ckpt-format torch_dist"
            run = megatron_run([*tiny_llama, *unusual.split(), *flags.split()])
            _trained[key] = Trained(directory, tokenizer_model, run.model[0].module)
            restart()
        return _trained[key]

    return train


@pytest.fixture
def fresh_megatron(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Megatron as in a new process, on the CPU, and again afterwards."""
    start_alone(monkeypatch)
    monkeypatch.setenv("MEGATRON_DYT_DEVICE", "cpu")
    restart()
    yield
    forget_run()


def restart() -> None:
    """Megatron as in a new process, once more."""
    forget_run()
    cpu.enable()


def without_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexing lm-eval's own tasks takes seconds."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path=None, include_defaults=True: manager(
            include_path=include_path, include_defaults=False
        ),
    )
