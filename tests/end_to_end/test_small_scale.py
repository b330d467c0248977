"""The whole way at small scale: Pile shards, training through the launch script, evaluation, export.

What `docs/pretraining.md` does on a cluster, with the same commands: only sizes and device differ.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import pile
from tests.evaluation.task_data import write_all

ROOT = Path(__file__).resolve().parents[2]
STEPS, LENGTH, DOCUMENTS = 30, 256, 600
BROKEN = {"00": 3, "01": 4, "02": 0}
# The 125M recipe scaled down; what is not here (optimizer, decay, embedding scale, preset) is the recipe's.
SMALL = f"""
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --seq-length {LENGTH}
    --max-position-embeddings {LENGTH} --global-batch-size 8 --micro-batch-size 4 --init-method-std 0.125
    --train-iters {STEPS} --lr-warmup-iters 3 --num-workers 0 --log-interval 1 --eval-iters 1 --lr 4e-3
"""


def run(*command: str, **settings: str) -> str:
    """Standard output of a command that succeeds."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    own = {"PY": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        **{"cwd": ROOT, "env": outside | own | settings, "capture_output": True, "text": True},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def megatron_dyt(command: str, *arguments: str, **settings: str) -> str:
    return run(sys.executable, "-m", "megatron_dyt", command, *arguments, **settings)


@pytest.mark.slow
@pytest.mark.distributed
def test_from_shards_to_equal_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare(tmp_path)
    checkpoint = train(tmp_path, data)
    write_all(tmp_path / "tasks", 4)
    ours = evaluate(tmp_path, checkpoint)
    export = tmp_path / "hf"
    megatron_dyt("export", "--load", str(checkpoint), "--output", str(export), "--max-shard-size", "100KB")
    theirs = evaluate_export(export, tmp_path, monkeypatch)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 15
    for task, metrics in ours.items():
        for name, value in metrics.items():
            assert theirs[task][name] == pytest.approx(value, abs=1e-4), (task, name)
    # Not all the same number: the comparison can fail.
    assert len({metrics.get("acc,none") for metrics in ours.values()}) > 3


def prepare(home: Path) -> dict[str, str]:
    """Shards -> tokenizer and data sets; the launch script's settings for them."""
    corpus = home / "pile"
    (corpus / "train").mkdir(parents=True)
    for seed, (name, broken) in enumerate(BROKEN.items()):
        pile.write_shard(corpus / "train" / f"{name}.jsonl.zst", seed, DOCUMENTS, broken)
    pile.write_shard(corpus / "val.jsonl.zst", 9, DOCUMENTS // 4)
    (home / "text.jsonl").write_bytes(pile.plain_text(0, DOCUMENTS))
    tokenizer = str(home / "tokenizer.model")
    sized = ["--vocab-size", "320", "--output", tokenizer]
    megatron_dyt("train-tokenizer", "--input", str(home / "text.jsonl"), *sized)
    for split, source in {"train": "train", "val": "val.jsonl.zst"}.items():
        prepare_data(corpus / source, home / "data" / split, tokenizer)
    check_manifest(home / "data" / "train")
    return {
        "TRAIN_DATA": str(home / "data" / "train"),
        "VALID_DATA": str(home / "data" / "val"),
        "TOKENIZER_MODEL": tokenizer,
    }


def prepare_data(source: Path, output: Path, tokenizer: str) -> None:
    paths = ("--input", str(source), "--output", str(output), "--tokenizer-model", tokenizer)
    megatron_dyt("prepare-data", *paths, "--workers", "2")


def check_manifest(directory: Path) -> None:
    """All good lines are there and the broken ones are counted; each domain has its share."""
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["documents"] == len(BROKEN) * DOCUMENTS
    assert sum(manifest["malformed"].values()) == sum(BROKEN.values())
    assert manifest["domains"].keys() == pile.DOMAINS.keys()
    assert sum(domain["documents"] for domain in manifest["domains"].values()) == manifest["documents"]
    assert len(manifest["shards"]) == len(BROKEN)


def train(home: Path, data: dict[str, str]) -> Path:
    """30 steps on two CPU processes, TP2 with sequence parallelism; the checkpoint directory."""
    settings = data | {
        "OUT": str(home / "run"),
        "GPUS_PER_NODE": "2",
        "PLAN_FLAGS": "--tp 2",
        "PRECISION": "fp32",
        "MEGATRON_DYT_DEVICE": "cpu",
    }
    log = run("bash", "examples/llama/125m.sh", *SMALL.split(), **settings)
    assert "--sequence-parallel" in log
    losses = [
        float(line.split("lm loss: ")[1].split()[0]) for line in log.splitlines() if "lm loss: " in line
    ]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 1
    assert "finished: all steps are in" in log
    return home / "run" / "checkpoint"


def evaluate(home: Path, checkpoint: Path) -> dict[str, dict[str, float]]:
    output = home / "eval.json"
    megatron_dyt(
        "eval",
        *("--load", str(checkpoint), "--tasks", "dyt_paper", "--task-data", str(home / "tasks")),
        *("--output", str(output)),
        MEGATRON_DYT_DEVICE="cpu",
    )
    return figures(json.loads(output.read_text())["results"])


def evaluate_export(export: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """lm-eval's own model for Hugging Face directories, on the same documents."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import dynamic_module_utils

    from megatron_dyt.evaluation.task_loading import load_tasks

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(home / "modules"))
    monkeypatch.syspath_prepend(str(home / "modules"))
    model = HFLM(
        pretrained=str(export),
        **{"device": "cpu", "dtype": "float32", "add_bos_token": True, "batch_size": 16},
        trust_remote_code=True,
    )
    tasks = load_tasks(["dyt_paper"], data=home / "tasks")
    return figures(evaluate(model, tasks, bootstrap_iters=0)["results"])


def figures(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The metrics of each task, without their standard errors, and without the group's row."""
    return {
        task: {
            name: value
            for name, value in row.items()
            if isinstance(value, float) and name.endswith(",none") and "stderr" not in name
        }
        for task, row in results.items()
        if task != "dyt_paper"
    }
