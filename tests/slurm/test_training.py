"""Real training on the cluster: two ranks on two nodes, stopped and requeued, lose nothing.

Only recipe, plan and dry run are fakes, which do not depend on Slurm.
"""

import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megatron_dyt.data.indexed_dataset import IndexedDatasetWriter
from tests.ranks import Parent, Rank
from tests.slurm.conftest import Cluster, Job, faked_settings

# By `make test-slurm`: what takes half a minute more, and is one more case of a kind that CI has.
everything = pytest.mark.skipif("MEGATRON_DYT_SLURM" not in os.environ, reason="run by `make test-slurm`")

FLAGS = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 2 --lr 1e-2 --lr-decay-style constant --swiglu
    --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights
    --normalization DyT --log-interval 1 --eval-iters 0 --num-workers 0 --train-iters 100000
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The scripts' settings for a tokenizer and data set."""
    home = tmp_path_factory.mktemp("data")
    model = home / "tokenizer.model"
    with model.open("wb") as file:
        lines = (f"line {number} of a small text" for number in range(50))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, vocab_size=30, minloglevel=2
        )
    data = home / "data"
    with IndexedDatasetWriter(data.with_suffix(".bin"), data.with_suffix(".idx"), np.uint16) as writer:
        ids = np.random.default_rng(1).integers(3, 30, 40_000, np.uint16)
        writer.add(ids, np.full(400, 100))
        writer.finish()
    return {"TRAIN_DATA": str(data), "VALID_DATA": str(data), "TOKENIZER_MODEL": str(model)}


def start(cluster: Cluster, home: Path, data: dict[str, str], *options: str, **settings: str) -> Job:
    real = {
        "FAKE_TRAIN": f'exec {sys.executable} "$@"',
        "MEGATRON_DYT_DEVICE": "cpu",
        "TRANSFORMER_IMPL": "local",
        "PRECISION": "fp32",
        "SAVE_INTERVAL": "100000",
    }
    places = ["--nodes", "2", "--gpus-per-node", "1", *options]
    given = faked_settings(home) | real | data | settings
    return cluster.submit(home, *places, flags=(*FLAGS.split(), *settings.get("MORE", "").split()), **given)


def losses(log: str) -> list[tuple[int, str]]:
    """Every step that was logged, and its loss as printed."""
    found = re.findall(r"iteration +(\d+)/ .*? lm loss: (\S+)", log)
    return [(int(step), loss) for step, loss in found]


def time_out(cluster: Cluster, job: Job) -> None:
    """Let the job's time be up in 40 to 100 s, so that the signal is due; the next start has more."""
    minutes, seconds = map(int, job.field("RunTime").split(":")[-2:])
    limit = math.ceil((60 * minutes + seconds + 40) / 60)
    cluster.call("scontrol", "update", f"JobId={job.number}", f"TimeLimit={limit}")
    job.until(lambda: job.field("Restarts") == "1", "the requeue")
    cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")


def signal(cluster: Cluster, job: Job) -> None:
    cluster.call("scancel", "--signal=TERM", job.number)
    job.until(lambda: job.field("Restarts") == "1", "the requeue")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("interrupt", "batch"), [(signal, "8"), pytest.param(time_out, "64", marks=everything)]
)
def test_a_requeued_run_has_the_losses_of_one_that_was_not(
    interrupt: Callable[[Cluster, Job], None],
    batch: str,
    cluster: Cluster,
    tmp_path: Path,
    data: dict[str, str],
    ranks: Parent,
) -> None:
    settings = {"SIGNAL_LEAD": "100", "MORE": f"--global-batch-size {batch}"}
    job = start(cluster, tmp_path, data, "--signal", "TERM@100", **settings)
    job.until(lambda: len(losses(job.text())) > 2, "three steps")
    interrupt(cluster, job)
    resumed = re.search(r"requeued, it resumes from step (\d+)", job.text())
    assert resumed, job.text()[-3000:]
    saved = int(resumed[1])
    job.until(lambda: len(losses(job.text())) > saved + 3, "steps after the requeue")
    (tmp_path / "run/stop").touch()
    cluster.call("scancel", "--signal=TERM", job.number)
    assert job.wait() == 0, job.text()[-3000:]

    once = uninterrupted(tmp_path, saved + 4, ranks)
    logged = losses(job.text())
    assert [step for step, _ in logged] == list(range(1, len(logged) + 1))
    compared = dict(logged[: saved + 4])
    # What Megatron logs second after a start is the mean of two steps.
    del compared[saved + 2]
    assert {step: once[step] for step in compared} == compared


def uninterrupted(home: Path, steps: int, ranks: Parent) -> dict[int, str]:
    """The losses of the same command line in one go, without Slurm."""
    *_, words = (home / "python").read_text().splitlines()[0].partition(" -m megatron_dyt.pretrain ")
    flags = words.replace(str(home / "run"), str(home / "once")).split()
    command = ["-m", "megatron_dyt.pretrain", "--device", "cpu", *flags, "--exit-interval", str(steps)]
    logs = [home / "once0", home / "once1"]
    codes = ranks.run([Rank(command, str(log)) for log in logs], watched=True)
    assert codes == [0, 0], logs[0].read_text()[-3000:]
    return dict(losses(logs[0].read_text() + logs[1].read_text()))


@everything
def test_a_tokenizer_that_one_node_lacks_ends_the_job_with_2(
    cluster: Cluster, tmp_path: Path, data: dict[str, str]
) -> None:
    lacking = '[ "$SLURM_NODEID" = 0 ] || set -- "${@/%tokenizer.model/gone.model}"'
    settings = {"FAKE_TRAIN": f'{lacking}; exec {sys.executable} "$@"', "MORE": "--global-batch-size 8"}
    job = start(cluster, tmp_path, data, **settings)
    assert job.wait() == 2, job.text()[-3000:]
    assert job.field("Restarts") == "0"
    assert "gone.model: no such file" in job.text()
    assert "the input is wrong (see above); not requeued" in job.text()
