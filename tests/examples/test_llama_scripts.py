"""The launch scripts: what they refuse, what they print, and a small training through one of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "examples/llama").glob("*.sh") if path.stem != "common")
# 125m.sh made small enough for two CPU processes; flags on the command line win.
SMALL = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --global-batch-size 4 --micro-batch-size 2 --lr-warmup-iters 1
    --init-method-std 0.125 --num-workers 0 --log-interval 1 --eval-iters 1 --eval-interval 3
"""


def run(script: str, *flags: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment |= {"PY": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | settings
    return subprocess.run(
        ["bash", f"examples/llama/{script}.sh", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_every_recipe_has_a_script() -> None:
    from megatron_dyt.recipes import names

    assert set(SCRIPTS) == set(names())
    for name in SCRIPTS:
        assert f"MODEL={name} " in (ROOT / f"examples/llama/{name}.sh").read_text()


def test_look_first_prints_the_plan_and_tries_the_flags() -> None:
    result = run("70b", "--seed", "7", PLAN_ONLY="1", NODES="128")
    assert result.returncode == 0, result.stderr
    for part in ("layout: TP ", " days at 40% MFU", "dry run: 1024 ranks", "dry run: fine", "--seed 7"):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "TRAIN_DATA is not set"),
        ({"TRAIN_DATA": "a", "VALID_DATA": "b", "TOKENIZER_MODEL": "none.model"}, "none.model is not a file"),
        (
            {"TRAIN_DATA": "0.5 no/where", "VALID_DATA": "b", "TOKENIZER_MODEL": "setup.py"},
            "no/where.idx is missing",
        ),
        ({"PLAN_ONLY": "1", "NODES": "1"}, "does not fit on 1 x 8 GPUs"),
        ({"PLAN_ONLY": "1", "NODES": "128", "NORM": "LayerNorm"}, "invalid choice: 'LayerNorm'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(settings: dict[str, str], message: str) -> None:
    result = run("70b", **settings)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_a_small_training_and_its_continuation(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the quick brown fox jumps over the lazy dog, and again and again"}\n' * 400)
    model, prefix = tmp_path / "tokenizer.model", tmp_path / "data"
    for command in (
        ["train_tokenizer", "--input", str(text), "--vocab-size", "300", "--output", str(model)],
        ["prepare", "--input", str(text), "--tokenizer-model", str(model), "--output-prefix", str(prefix)],
    ):
        subprocess.run(
            [sys.executable, "-m", f"megatron_dyt.data.{command[0]}", *command[1:]], cwd=ROOT, check=True
        )
    settings = {
        "TRAIN_DATA": str(prefix),
        "VALID_DATA": str(prefix),
        "TOKENIZER_MODEL": str(model),
        "OUT": str(tmp_path / "run"),
        "GPUS_PER_NODE": "2",
        "PLAN_FLAGS": "--tp 2",
        "SAVE_INTERVAL": "2",
        "MEGATRON_DYT_DEVICE": "cpu",
    }
    first = run("125m", *SMALL.split(), "--train-iters", "2", **settings)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    assert "layout: TP 2" in first.stdout
    assert "finished: all steps are in" in first.stdout
    second = run("125m", *SMALL.split(), "--train-iters", "4", "--override-opt_param-scheduler", **settings)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    assert "iteration        3/       4" in second.stdout
    assert "iteration        1/       4" not in second.stdout
