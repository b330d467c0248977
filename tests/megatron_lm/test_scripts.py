"""Megatron-LM's own scripts, of every release that has a patch, train with DyT: unmodified, and patched.

Two processes, tensor and sequence parallel, on the CPU. Skipped unless MEGATRON_LM names a clone.
"""

import ast
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.fork_patches import INSERTIONS, PATCHES
from tests.megatron_lm.conftest import ARGV, SAVED, STEPS, Train, losses

pytestmark = pytest.mark.distributed

ON_CPU = str(Path(__file__).with_name("on_cpu.py"))


def test_an_unmodified_script_trains(unmodified: SimpleNamespace) -> None:
    assert len(unmodified.losses) == STEPS
    assert float(unmodified.losses[-1]) < 0.5 * float(unmodified.losses[0])
    assert "DyT attn    2 sites" in unmodified.log


def test_it_resumes(checkout: Path, train: Train, unmodified: SimpleNamespace) -> None:
    loading = ["--load", str(unmodified.save), "--ckpt-step", str(SAVED)]
    script = str(checkout / "pretrain_gpt.py")
    resumed = losses(train(checkout, ["-m", "megatron_dyt.run", script, *ARGV, *loading]))
    assert len(resumed) == STEPS - SAVED
    # Megatron logs the mean of the first two steps in the place of the second.
    assert (resumed[0], resumed[-1]) == (unmodified.losses[SAVED], unmodified.losses[-1])


def test_our_own_entry_computes_the_same(
    release: str, checkout: Path, train: Train, unmodified: SimpleNamespace
) -> None:
    if release.startswith("core_v0.16."):
        pytest.skip("megatron_dyt.pretrain needs the training loop of 0.17 or newer")
    assert losses(train(checkout, ["-m", "megatron_dyt.pretrain", *ARGV])) == unmodified.losses


def test_the_patched_script_computes_the_same(
    release: str, checkout: Path, train: Train, unmodified: SimpleNamespace, tmp_path: Path
) -> None:
    patched = tmp_path / "patched"
    shutil.copytree(checkout, patched)
    # A repository of its own, so that git does not look further up.
    git(patched, "init", "--quiet")
    git(patched, "apply", "--unidiff-zero", str(PATCHES / f"{release}.patch"))
    script = str(patched / "pretrain_gpt.py")
    assert losses(train(patched, [ON_CPU, script, *ARGV])) == unmodified.losses


def test_the_hybrid_script_computes_the_same(
    checkout: Path, train: Train, unmodified: SimpleNamespace
) -> None:
    """A stack of attention and MLP layers is the GPT model; Mamba layers need a GPU."""
    script, pattern = "pretrain_hybrid.py", "--hybrid-layer-pattern"
    if not (checkout / script).exists():
        script = "pretrain_mamba.py"
    if pattern not in (checkout / "megatron/training/arguments.py").read_text():
        pattern = "--hybrid-override-pattern"
    # 0.16 must be told what later releases find out: how many layers, and that half of them are MLPs, which
    # decides the initial std of output layers.
    told = ["--num-layers", "4", "--is-hybrid-model"] if pattern == "--hybrid-override-pattern" else []
    place = ARGV.index("--num-layers")
    words = ARGV[:place] + ARGV[place + 2 :]
    stack = [pattern, "*-*-", "--spec", "tests.megatron_lm.local_stack", "SPEC"]
    log = train(checkout, ["-m", "megatron_dyt.run", str(checkout / script), *words, *told, *stack])
    assert losses(log) == unmodified.losses


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_a_fork_that_has_moved_the_lines(release: str, clone: Path, checkout: Path, tmp_path: Path) -> None:
    """As patches/README.md says: fetch the release, then a three-way apply puts the lines right."""
    fork = tmp_path / "fork"
    for insertion in INSERTIONS:
        (fork / insertion.file).parent.mkdir(parents=True)
        moved = "# a line of the fork\n" * 50 + (checkout / insertion.file).read_text()
        (fork / insertion.file).write_text(moved)
    git(fork, "init", "--quiet")
    git(fork, "add", "megatron")
    git(fork, "commit", "--quiet", "--message", "fork")
    git(fork, "fetch", "--depth", "1", clone.as_uri(), "tag", release, "--no-tags")
    git(fork, "apply", "--3way", "--unidiff-zero", str(PATCHES / f"{release}.patch"))
    for insertion in INSERTIONS:
        text = (fork / insertion.file).read_text()
        assert insertion.lines in text
        before = text[: text.index(insertion.lines)]
        # What stands before parses, and ends with the function, which has its docstring alone so far.
        nodes = ast.walk(ast.parse(before))
        last = max((n for n in nodes if isinstance(n, ast.FunctionDef)), key=lambda node: node.lineno)
        assert (last.name, len(last.body)) == (insertion.function.split()[-1], 1)
