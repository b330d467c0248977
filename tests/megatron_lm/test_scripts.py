"""Megatron-LM's own scripts, of every release that has a patch, train with DyT: unmodified, and patched.

Two processes, tensor and sequence parallel, on the CPU. Skipped unless MEGATRON_LM names a clone.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.fork_patches import INSERTIONS, PATCHES
from tests.megatron_lm.conftest import RELEASES, Train, losses

ON_CPU = str(Path(__file__).with_name("on_cpu.py"))
STEPS = 6
SAVED = 3

DYT = ["--normalization", "DyT", "--dyt-preset", "unit"]
SPLIT = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]


@pytest.mark.distributed
@pytest.mark.parametrize("release", RELEASES)
def test_pretrain_gpt(
    release: str,
    checkout_of: Callable[[str], Path],
    train: Train,
    tiny_llama: list[str],
    tmp_path: Path,
) -> None:
    """Unmodified: trains, saves, resumes. Patched, and by our own entry: the same losses to the digit."""
    checkout = checkout_of(release)
    script = str(checkout / "pretrain_gpt.py")
    argv = [*tiny_llama, *DYT, *SPLIT, "--train-iters", str(STEPS), "--make-vocab-size-divisible-by", "16"]
    saving = ["--save", str(tmp_path), "--save-interval", str(SAVED)]
    log = train(checkout, ["-m", "megatron_dyt.run", script, *argv, *saving])
    whole = losses(log)
    assert len(whole) == STEPS
    assert float(whole[-1]) < 0.5 * float(whole[0])
    assert "DyT attn    2 sites" in log

    loading = ["--load", str(tmp_path), "--ckpt-step", str(SAVED)]
    resumed = losses(train(checkout, ["-m", "megatron_dyt.run", script, *argv, *loading]))
    # Megatron logs the mean of the first two steps in the place of the second.
    assert (len(resumed), resumed[0], resumed[-1]) == (STEPS - SAVED, whole[SAVED], whole[-1])

    assert losses(train(checkout, ["-m", "megatron_dyt.pretrain", *argv])) == whole

    apply(checkout, PATCHES / f"{release}.patch")
    assert losses(train(checkout, [ON_CPU, script, *argv])) == whole


def apply(checkout: Path, patch: Path) -> None:
    """The checkout is in no repository, so that git does not look further up."""
    subprocess.run(["git", "init", "--quiet"], cwd=checkout, check=True)
    subprocess.run(["git", "apply", "--unidiff-zero", str(patch)], cwd=checkout, check=True)


@pytest.mark.parametrize("release", RELEASES)
def test_a_fork_that_has_moved_the_lines(
    release: str, clone: Path, checkout_of: Callable[[str], Path]
) -> None:
    """As patches/README.md says: fetch the release, then a three-way apply puts the lines right."""
    fork = checkout_of(release)

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=fork, check=True, capture_output=True)

    for insertion in INSERTIONS:
        path = fork / insertion.file
        path.write_text("# a line of the fork\n" * 50 + path.read_text())
    git("init", "--quiet")
    git("add", "megatron")
    git("commit", "--quiet", "--message", "fork")
    git("fetch", "--depth", "1", clone.as_uri(), "tag", release, "--no-tags")
    git("apply", "--3way", "--unidiff-zero", str(PATCHES / f"{release}.patch"))
    for insertion in INSERTIONS:
        text = (fork / insertion.file).read_text()
        assert insertion.lines in text
        before = text[: text.index(insertion.lines)]
        # What stands before parses, and ends with the function, which has its docstring alone so far.
        nodes = ast.walk(ast.parse(before))
        last = max((n for n in nodes if isinstance(n, ast.FunctionDef)), key=lambda node: node.lineno)
        assert (last.name, len(last.body)) == (insertion.function.split()[-1], 1)
