"""Checkouts of Megatron-LM's releases, from the clone that the variable MEGATRON_LM names."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import fork_patches

REPOSITORY = Path(__file__).resolve().parents[2]
RELEASES = sorted(path.stem for path in fork_patches.PATCHES.glob("*.patch"))
TIMEOUT = float(os.environ.get("MEGATRON_DYT_TEST_TIMEOUT", "300"))

# Starts and trains a script: (folder of the checkout, words after torchrun's own) -> what it printed.
Train = Callable[[Path, list[str]], str]


@pytest.fixture(scope="session")
def clone() -> Path:
    """The clone, or the tests are skipped."""
    given = os.environ.get("MEGATRON_LM", "")
    if not given:
        pytest.skip("MEGATRON_LM is not set: give the path of a clone of Megatron-LM with the release tags")
    return Path(given).resolve()


@pytest.fixture(scope="session")
def checkout_of(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkout_of(tag)` is a folder with that release's files, its own for every call."""
    tags = fork_patches.tags_of(clone)

    def export(tag: str) -> Path:
        if tag not in tags:
            pytest.skip(f"{clone} has no tag {tag}: git fetch --tags")
        folder = tmp_path_factory.mktemp(tag)
        command = ["git", "-C", str(clone), "archive", tag, "--", ":/*.py", "megatron"]
        archive = subprocess.run(command, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        return folder

    return export


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
        done = subprocess.run(
            [*command, *words],
            env=os.environ | settings,
            cwd=checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    return run


def losses(log: str) -> list[str]:
    """The losses that a run has logged, as they were printed."""
    return re.findall(r"lm loss: (\S+)", log)
