"""The launch scripts: what they refuse, what they print, and that Megatron takes it."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.recipes import load, names
from megatron_dyt.recipes.layout import Cluster
from megatron_dyt.recipes.plan import Speeds, ranked
from tests.recipes.test_dry_run import forget

from . import fakes

__all__ = ["forget"]  # a fixture

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "examples/llama").glob("[0-9]*.sh"))
# 125m.sh made small enough for two CPU processes; flags on the command line win.
SMALL = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --global-batch-size 4 --micro-batch-size 2 --lr-warmup-iters 1
    --init-method-std 0.125 --num-workers 0 --log-interval 1 --eval-iters 1 --eval-interval 3
"""


def environment(**settings: str) -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return outside | {"PY": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings


def run(script: str, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"examples/llama/{script}.sh", *flags],
        cwd=ROOT,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_every_recipe_has_a_script() -> None:
    assert set(SCRIPTS) == set(names())
    for name in SCRIPTS:
        assert f"MODEL={name} " in (ROOT / f"examples/llama/{name}.sh").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_slurm_is_asked_for_what_the_script_expects(name: str) -> None:
    text = (ROOT / f"examples/llama/{name}.sh").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH --")
    )
    # A task a GPU; SIGTERM to the tasks, so without "B:", which would be to the batch shell alone.
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"] == "TERM@600"
    assert {"requeue", "exclusive"} <= options.keys()
    assert options["open-mode"] == "append"  # A requeued job writes into the same log.


def looked_at(script: str, home: Path, *flags: str, **settings: str) -> tuple[str, list[str], list[str]]:
    """With PLAN_ONLY: what is printed, what the dry run is asked for, and the flags that would run."""
    result = run(script, *flags, PLAN_ONLY="1", **fakes.dry_run(home), **settings)
    assert result.returncode == 0, result.stderr
    asked = shlex.split((home / "dry-run").read_text())
    return result.stdout, asked[: asked.index("--")], asked[asked.index("--") + 1 :]


@pytest.mark.parametrize(("name", "norm"), [*((name, "DyT") for name in SCRIPTS), ("70b", "RMSNorm")])
def test_look_first_prints_the_plan_and_what_would_run(name: str, norm: str, tmp_path: Path) -> None:
    recipe, cluster = load(name), Cluster(128, 8, 80e9)
    layout = ranked(recipe, cluster, Speeds())[0].layout
    text, asked, flags = looked_at(name, tmp_path, "--seed", "7", NODES="128", NORM=norm)
    assert f"layout: {layout.describe()}" in text
    assert " days at 40% MFU" in text
    assert shlex.split(text.splitlines()[-1]) == flags
    planned = [*recipe.flags(norm), *layout.flags()]
    assert flags[: len(planned)] == planned
    assert flags[-2:] == ["--seed", "7"]
    assert ("--dyt-stats-interval" in flags) == (norm == "DyT")
    assert asked == ["--nodes", "128", "--gpus-per-node", "8", "--vocab-size", "32000"]


def test_the_flags_are_for_what_is_installed(tmp_path: Path) -> None:
    """Here neither Transformer Engine nor apex."""
    from megatron_dyt.training import gpu_needs

    _, _, flags = looked_at("125m", tmp_path, TRANSFORMER_IMPL="local")
    extension = importlib.util.find_spec(gpu_needs.FUSION) is not None
    assert ("--no-gradient-accumulation-fusion" in flags) != extension
    local = {"--no-rope-fusion", "--no-masked-softmax-fusion", "--no-persist-layer-norm"}
    assert local <= set(flags)
    _, _, flags = looked_at("125m", tmp_path)
    assert not local & set(flags)


@pytest.mark.parametrize("norm", ["DyT", "RMSNorm"])
def test_megatron_takes_the_scripts_flags(
    norm: str, tmp_path: Path, forget: None, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_dyt.recipes import dry_run

    _, _, flags = looked_at("125m", tmp_path, NORM=norm)
    assert "padded vocabulary 32000" in "\n".join(dry_run.run(flags, 8, 32000))
    assert "Megatron warns" not in capsys.readouterr().out  # It would say that asynchronous saves are off.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "TRAIN_DATA is not set"),
        ({"TRAIN_DATA": "a", "VALID_DATA": "b", "TOKENIZER_MODEL": "none.model"}, "none.model is not a file"),
        (
            {"TRAIN_DATA": "0.5 no/where", "VALID_DATA": "b", "TOKENIZER_MODEL": "setup.py"},
            "no/where.idx is missing",
        ),
        ({"PLAN_ONLY": "1", "TRAIN_DATA": "no/where"}, "no/where.idx is missing"),
        ({"PLAN_ONLY": "1", "TOKENIZER_MODEL": "none.model"}, "none.model is not a file"),
        ({"PLAN_ONLY": "1", "NODES": "1"}, "does not fit on 1 x 8 GPUs"),
        ({"PLAN_ONLY": "1", "NODES": "128", "NORM": "LayerNorm"}, "'LayerNorm' is not one of"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(settings: dict[str, str], message: str) -> None:
    result = run("70b", **settings)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tokenizer and a small data set, as the scripts' settings."""
    home = tmp_path_factory.mktemp("data")
    text, model, prefix = home / "text.jsonl", home / "tokenizer.model", home / "data"
    line = json.dumps({"text": "the quick brown fox jumps over the lazy dog, and again and again"})
    text.write_text(f"{line}\n" * 400)
    for command in (
        ["train-tokenizer", "--input", str(text), "--vocab-size", "300", "--output", str(model)],
        [
            "prepare-data",
            "--input",
            str(text),
            "--tokenizer-model",
            str(model),
            "--output-prefix",
            str(prefix),
        ],
    ):
        subprocess.run([sys.executable, "-m", "megatron_dyt", *command], cwd=ROOT, check=True)
    return {"TRAIN_DATA": str(prefix), "VALID_DATA": str(prefix), "TOKENIZER_MODEL": str(model)}


@pytest.mark.parametrize("looking", [{}, {"PLAN_ONLY": "1"}], ids=["training", "looking"])
def test_nothing_starts_after_a_dry_run_that_failed(
    looking: dict[str, str], tmp_path: Path, data: dict[str, str]
) -> None:
    """Which is given the files to check, as they are part of what can be wrong."""
    settings = data | {"OUT": str(tmp_path / "run"), "FAKE_DRY_RUN": "2"} | fakes.dry_run(tmp_path)
    result = run("125m", **settings, **looking)
    assert result.returncode == 2
    assert not (tmp_path / "run").exists()
    asked = shlex.split((tmp_path / "dry-run").read_text())
    assert asked[4:7] == ["--files", "--tokenizer-model", data["TOKENIZER_MODEL"]]


def test_truncated_data_are_found_by_the_dry_run(tmp_path: Path, data: dict[str, str], forget: None) -> None:
    from megatron_dyt.recipes import dry_run

    for suffix in (".idx", ".bin"):
        shutil.copy(data["TRAIN_DATA"] + suffix, tmp_path / f"data{suffix}")
    os.truncate(tmp_path / "data.bin", 1000)
    settings = data | {"VALID_DATA": str(tmp_path / "data")}
    _, asked, flags = looked_at("125m", tmp_path, *SMALL.split(), **settings, GPUS_PER_NODE="2")
    with pytest.raises(UserError, match=r"data\.bin has 1000 bytes"):
        dry_run.run(flags, 2, dry_run.tokenizer_entries(asked[-1]), files=True)
