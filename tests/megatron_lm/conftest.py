"""Checkouts of Megatron-LM's releases, from the clone that the variable MEGATRON_LM names."""

import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import fork_patches
from tests.conftest import TINY_LLAMA

REPOSITORY = Path(__file__).resolve().parents[2]
RELEASES = sorted(path.stem for path in fork_patches.PATCHES.glob("*.patch"))
TIMEOUT = float(os.environ.get("MEGATRON_DYT_TEST_TIMEOUT", "600"))
STEPS, SAVED = 6, 3

ARGV = [
    *TINY_LLAMA.split(),
    *("--normalization", "DyT", "--dyt-preset", "unit", "--train-iters", str(STEPS)),
    *("--tensor-model-parallel-size", "2", "--sequence-parallel", "--make-vocab-size-divisible-by", "16"),
]

# (folder of the checkout, what torchrun starts with its arguments) -> what was printed.
Train = Callable[[Path, list[str]], str]


@pytest.fixture(scope="session")
def clone() -> Path:
    """The clone, or the tests are skipped."""
    given = os.environ.get("MEGATRON_LM", "")
    if not given:
        pytest.skip("MEGATRON_LM is not set: give the path of a clone of Megatron-LM with the release tags")
    return Path(given).resolve()


@pytest.fixture(scope="session", params=RELEASES)
def release(request: pytest.FixtureRequest, clone: Path) -> str:
    """The tag of a release that has a patch."""
    tag: str = request.param
    if tag not in fork_patches.tags_of(clone):
        pytest.skip(f"{clone} has no tag {tag}: git fetch --tags")
    return tag


@pytest.fixture(scope="session")
def checkout(release: str, clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the release's scripts and package."""
    folder = tmp_path_factory.mktemp(release)
    # Not its tests: they would stand before ours.
    command = ["git", "-C", str(clone), "archive", release, "--", ":(glob)*.py", "megatron"]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def train() -> Train:
    """Runs torchrun with two processes on the CPU; the checkout's `megatron` comes first."""

    def run(checkout: Path, words: list[str]) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        settings = {
            "PYTHONPATH": f"{checkout}:{REPOSITORY}",
            "MEGATRON_DYT_DEVICE": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        process = subprocess.Popen(
            [*command, *words],
            env=os.environ | settings,
            cwd=checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            log, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks, which have sessions of their own.
            log, _ = process.communicate()
            pytest.fail(f"not ended in {TIMEOUT:g} s (MEGATRON_DYT_TEST_TIMEOUT):\n{log[-4000:]}")
        cause = max(log.find("Traceback"), 0)  # torchrun's own comes last
        assert process.returncode == 0, log[cause : cause + 4000]
        return log

    return run


@pytest.fixture(scope="session")
def unmodified(checkout: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """pretrain_gpt.py under `megatron_dyt.run`: its log, its losses, and the checkpoints it saved."""
    save = tmp_path_factory.mktemp("save")
    saving = ["--save", str(save), "--save-interval", str(SAVED)]
    script = str(checkout / "pretrain_gpt.py")
    log = train(checkout, ["-m", "megatron_dyt.run", script, *ARGV, *saving])
    return SimpleNamespace(log=log, losses=losses(log), save=save)


def losses(log: str) -> list[str]:
    """The losses that a run has logged, as they were printed."""
    return re.findall(r"lm loss: (\S+)", log)
