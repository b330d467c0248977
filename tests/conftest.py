"""Fixtures shared by all tests: Megatron's own training loop, run inside the test process."""

import contextlib
import importlib.metadata
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dyt import log
from tests import help_texts, results
from tests.ranks import Parent
from tests.workers import ByFolder, longest_first

# A LLaMA small enough to train for some steps in a second; tests append what they vary.
TINY_LLAMA = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-2
    --lr-decay-style constant --swiglu --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0
    --hidden-dropout 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 63
    --log-interval 1 --eval-interval 100 --eval-iters 0 --num-workers 0
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-results",
        metavar="DIRECTORY",
        help="write every test's outcome to DIRECTORY/MEGATRON_VERSION.json",
    )


def pytest_configure(config: pytest.Config) -> None:
    log.show()  # As every entry point does: tests read the plugin's lines from stdout.
    directory = config.getoption("--record-results")
    # With several pytest processes the one that hands out the tests hears of all outcomes.
    if directory and not hasattr(config, "workerinput"):
        config.pluginmanager.register(results.Recorder(Path(directory)), "recorder")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return ByFolder(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what the installed Megatron is too old for: `@pytest.mark.needs("training_loop")`."""
    help_texts.remember()  # Megatron's parser may have been imported by the last test.
    for mark in item.iter_markers("needs"):
        _skip_without(mark.args[0])


def _skip_without(feature: str) -> None:
    from megatron_dyt import compat

    # Not by `compat.megatron_version`: it imports Megatron, which the CPU runtime wants to do first.
    version = importlib.metadata.version("megatron-core")
    if not compat.has(feature, version):
        pytest.skip(f"megatron-core {version}: {feature} came with {compat.SINCE[feature]}")


@pytest.fixture(autouse=True)
def no_address_left() -> Iterator[None]:
    """What a run in the test process leaves as its address must not reach a later test or its processes."""
    yield
    for variable in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable, None)


@pytest.fixture(scope="session")
def training_loop() -> None:
    """Skips where Megatron has no training loop."""
    _skip_without("training_loop")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Parent]:
    """Starts processes that have imported Megatron already: `ranks.run([Rank(...), ...], watched=True)`."""
    parent = Parent()
    yield parent
    parent.close()


@pytest.fixture
def tiny_llama() -> list[str]:
    """Arguments of a small model on mock data; a flag given again later wins."""
    return TINY_LLAMA.split()


@pytest.fixture
def megatron_run(
    training_loop: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., SimpleNamespace]]:
    """`megatron_run(argv)` trains by `megatron_dyt.pretrain` on CPU in this process.

    Returns `losses` (one exact float a step), `model` (Megatron's list of model chunks),
    `optimizer`, `log` (stdout) and `weights()` (copies of the model's parameters by name). The model can be
    used until the next call or the test's end.
    """
    start_alone(monkeypatch)
    yield _run
    forget_run()


def start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process has that is no rank of a launch."""
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain"])


def _run(argv: list[str]) -> SimpleNamespace:
    from megatron_dyt import pretrain
    from megatron_dyt.patching import replaced

    forget_run()
    seen = SimpleNamespace(losses=[], model=None, optimizer=None, log="")
    seen.weights = lambda: {name: p.detach().clone() for name, p in seen.model[0].named_parameters()}
    output = io.StringIO()
    try:
        # The observers come after the CPU runtime, which must be on before Megatron is imported.
        from megatron_dyt import cpu

        cpu.enable()
        with replaced(*_observers(seen)), contextlib.redirect_stdout(output):
            pretrain.main(["--device", "cpu", *argv])
    finally:
        seen.log = output.getvalue()
        sys.stdout.write(seen.log)
    return seen


def _observers(seen: SimpleNamespace) -> list[Any]:
    from megatron_dyt.patching import Replacement, wrapper

    @wrapper
    def keep_loss(train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        # There is none when Megatron's check of the loss ends the run.
        seen.losses += [float(loss) for name, loss in result[0].items() if name == "lm loss"]
        return result

    @wrapper
    def keep_model(setup: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = setup(*args, **kwargs)
        seen.model, seen.optimizer = result[:2]
        return result

    training = "megatron.training.training"
    return [
        Replacement(training, "train_step", keep_loss),
        Replacement(training, "setup_model_and_optimizer", keep_model),
    ]


def forget_run() -> None:
    """Put Megatron's global state, the process groups and the CPU runtime away."""
    import torch

    from megatron_dyt import cpu

    if "megatron.training.training" in sys.modules:
        from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
        from megatron.training.training import destroy_global_state

        destroy_global_state()
        MTPLossLoggingHelper.tracker = {}  # Of the number of prediction layers that the run had.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    cpu.disable()
