"""The pretrain entry point, on Megatron's own loop."""

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dyt import errors, pretrain
from megatron_dyt.checkpoints.iterations import TRACKER
from megatron_dyt.errors import UserError
from megatron_dyt.patching import Patches, Replacement
from tests.ranks import Parent, Rank

pytestmark = pytest.mark.needs("training_loop")

Run = Callable[[list[str]], SimpleNamespace]


def test_trains_evaluates_and_names_the_changed_flags(megatron_run: Run, tiny_llama: list[str]) -> None:
    flags = ["--eval-iters", "1", "--eval-interval", "2", "--check-for-spiky-loss"]
    run = megatron_run([*tiny_llama, *flags])
    assert len(run.losses) == 4
    assert run.losses[-1] < run.losses[0]
    (line,) = re.findall(r"megatron_dyt: CPU runtime .*", run.log)
    assert "--distributed-backend gloo --transformer-impl local" in line
    assert len(re.findall(r"validation loss at iteration [24] \| lm loss value", run.log)) == 2


def test_without_an_interval_it_evaluates_after_the_last_step(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path
) -> None:
    where = tiny_llama.index("--eval-interval")
    argv = [*tiny_llama[:where], *tiny_llama[where + 2 :], "--eval-iters", "1"]
    for more in (
        ["--save", str(tmp_path), "--save-interval", "2"],
        ["--load", str(tmp_path), "--ckpt-step", "2"],
    ):
        run = megatron_run([*argv, *more])
        assert "without --eval-interval" in run.log
        assert re.findall(r"validation loss at iteration (\d+) on validation set", run.log) == ["4"]
    assert len(run.losses) == 2


@pytest.mark.parametrize(
    "flags",
    [[], ["--bf16", "--use-distributed-optimizer"]],
    ids=["fp32", "bf16-distributed"],
)
def test_resuming_equals_never_stopping(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, flags: list[str]
) -> None:
    argv = [*tiny_llama, *flags, "--attention-dropout", "0.1", "--hidden-dropout", "0.1"]
    whole = megatron_run([*argv, "--save", str(tmp_path), "--save-interval", "2"])
    resumed = megatron_run([*argv, "--load", str(tmp_path), "--ckpt-step", "2"])
    assert resumed.losses == whole.losses[2:]
    torch.testing.assert_close(resumed.weights(), whole.weights(), rtol=0, atol=0)


def test_initial_weights_do_not_depend_on_other_flags(megatron_run: Run, tiny_llama: list[str]) -> None:
    still = ["--lr", "0", "--min-lr", "0", "--train-iters", "1"]
    drawn = megatron_run([*tiny_llama, *still]).weights()
    other = ["--seq-length", "16", "--micro-batch-size", "1", "--use-cpu-initialization"]
    second = megatron_run([*tiny_llama, *still, *other, "--max-position-embeddings", "64"])
    torch.testing.assert_close(second.weights(), drawn, rtol=0, atol=0)


def test_fp16_trains_once_the_loss_scale_fits(megatron_run: Run, tiny_llama: list[str]) -> None:
    argv = [*tiny_llama, "--fp16", "--initial-loss-scale", "1024", "--train-iters", "8"]
    run = megatron_run(argv)
    assert run.losses[-1] < run.losses[0]
    assert "number of skipped iterations:   0" in run.log


def test_multi_token_prediction(megatron_run: Run, tiny_llama: list[str]) -> None:
    run = megatron_run([*tiny_llama, "--mtp-num-layers", "1"])
    assert "mtp_1 loss" in run.log
    assert run.losses[-1] < run.losses[0]


def write_dataset(prefix: Path, documents: int = 40, vocabulary: int = 60) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for first in range(documents):
        tokens = (np.arange(40) + first) % vocabulary
        builder.add_document(tokens.astype(np.uint16), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def test_an_indexed_dataset(megatron_run: Run, tiny_llama: list[str], tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "counting")
    argv = [word for word in tiny_llama if word != "--mock-data"]
    argv += ["--train-data-path", prefix, "--valid-data-path", prefix, "--eval-iters", "1"]
    run = megatron_run([*argv, "--train-iters", "12", "--data-cache-path", str(tmp_path / "cache")])
    # The next token is always the last one plus one: far better than chance, ln 60 = 4.1.
    assert run.losses[-1] < 3
    truncated = Path(f"{prefix}.bin")
    truncated.write_bytes(truncated.read_bytes()[:-2])
    with pytest.raises(UserError, match="truncated or belongs to another dataset"):
        megatron_run(argv)


def test_data_of_a_larger_vocabulary(megatron_run: Run, tiny_llama: list[str], tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "counting", documents=200, vocabulary=200)
    argv = [word for word in tiny_llama if word != "--mock-data"]
    argv += ["--train-data-path", prefix, "--valid-data-path", prefix]
    # 63 entries, padded to 128.
    with pytest.raises(UserError, match=r"counting has the id 199 .* vocabulary is 128 entries"):
        megatron_run(argv)


def test_a_middle_stage_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.training as training
    from megatron.training import utils

    args = SimpleNamespace(sft=False, dataloader_inter_document_masking=False)
    monkeypatch.setattr(training, "get_args", lambda: args)
    monkeypatch.setattr(utils, "is_first_or_last_pipeline_stage", lambda _stage: False)
    monkeypatch.setattr(pretrain, "mtp_on_this_rank", lambda _config, _stage: False)
    batch = pretrain.get_batch(None, SimpleNamespace(), None)
    assert set(batch) >= {"tokens", "labels", "cu_seqlens"}
    assert set(batch.values()) == {None}


@pytest.mark.needs("model_builders")
@pytest.mark.parametrize("padded", [None, [[0, 4, 8]]])
def test_bounds_of_packed_sequences(monkeypatch: pytest.MonkeyPatch, padded: list[list[int]] | None) -> None:
    import megatron.training as training
    from megatron.training import training as loop

    counted: list[torch.Tensor] = []
    monkeypatch.setattr(training, "get_args", lambda: SimpleNamespace(seq_length=8))
    monkeypatch.setattr(loop, "update_seqlen_stats_from_cu_seqlens", counted.append)
    batch = {
        "cu_seqlens": torch.tensor([[0, 3, 7]]),
        "cu_seqlens_padded": None if padded is None else torch.tensor(padded),
        "max_seqlen": torch.tensor(4),
        "local_cp_size": None,
        "hybrid_cp_group": None,
    }
    packed = pretrain._packed_sequences(batch)
    assert packed is not None
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.tolist() == ([0, 3, 7] if padded is None else [0, 4, 8])
    assert packed.max_seqlen_kv == 4
    assert [real.tolist() for real in counted] == [[0, 3, 7]]


@pytest.mark.needs("model_builders")
def test_a_distillation_loss_takes_the_place_of_the_label_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import megatron.training as training
    from megatron.training import distillation

    names = ("dir", "decode_threads", "prefetch_factor", "msc_prefetch_depth", "kd_loss_alpha")
    flags = {f"logits_load_{name}": 1 for name in (*names, "ignore_errors")}
    args = SimpleNamespace(**flags, check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False)
    made: list[dict[str, Any]] = []

    def reader(**options: Any) -> Callable[..., tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
        made.append(options)
        return lambda mask, output, model: (output.sum() * mask.sum(), mask.sum(), {"kd": model})

    monkeypatch.setattr(training, "get_args", lambda: args)
    monkeypatch.setattr(distillation, "LossFuncCallable", reader)
    monkeypatch.setattr("megatron.core.rerun_state_machine.get_rerun_state_machine", lambda: None)
    pretrain._cached_distillation_loss.cache_clear()
    for _ in range(2):
        loss, tokens, report = pretrain.loss_func(torch.ones(3), torch.tensor([1.0, 2.0]))
        assert (loss.item(), tokens.item(), report) == (9.0, 3.0, {"kd": None})
    assert made == [{"logprobs_dir": 1, **dict.fromkeys((*names[1:], "ignore_errors"), 1)}]


def test_the_loss_counts_what_the_mask_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.training as training

    args = SimpleNamespace(
        logits_load_dir=None, check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False
    )
    monkeypatch.setattr(training, "get_args", lambda: args)
    monkeypatch.setattr("megatron.core.rerun_state_machine.get_rerun_state_machine", lambda: None)
    output = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.bfloat16)
    loss, tokens, report = pretrain.loss_func(torch.tensor([[1.0, 0.0, 1.0]]), output)
    assert (loss.item(), loss.dtype) == (5.0, torch.float32)
    assert (tokens.item(), tokens.dtype) == (2, torch.int32)
    assert report["lm loss"].tolist() == [5.0, 2.0]


def test_embedding_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.training as training
    from megatron.core.transformer import multi_token_prediction
    from megatron.training import arguments

    args = SimpleNamespace(untie_embeddings_and_output_weights=False)
    monkeypatch.setattr(training, "get_args", lambda: args)
    monkeypatch.setattr(arguments, "core_transformer_config_from_args", lambda _args: None)
    monkeypatch.setattr(multi_token_prediction, "get_mtp_ranks", lambda ranks, _config: [ranks[1]])
    assert pretrain.get_embedding_ranks([5]) == [5]
    assert pretrain.get_embedding_ranks([1, 3, 7]) == [1, 3, 7]
    args.untie_embeddings_and_output_weights = True
    assert pretrain.get_embedding_ranks([1, 3, 7]) == [1, 3]


def at_save(iteration: int, action: Callable[[], object]) -> Patches:
    """While applied, `action` happens when the checkpoint's data of `iteration` are being written."""
    writer = "megatron.core.dist_checkpointing.strategies.filesystem_async"

    def acting(write: Any) -> Any:
        def write_and_act(*args: Any, **kwargs: Any) -> Any:
            bucket = kwargs["write_bucket"]
            if f"iter_{iteration:07d}" in str(bucket[0]):
                Path(bucket[0]).write_bytes(b"half of it")
                action()
            return write(*args, **kwargs)

        return staticmethod(write_and_act)

    patches = Patches()
    patches.apply([Replacement(writer, "FileSystemWriterAsync.write_preloaded_data", acting)])
    return patches


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("event", "ending", "code"),
    [
        (disk_full, "the checkpoint could not be written", 1),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "terminated by SIGTERM", 143),
        (lambda: os.kill(os.getpid(), signal.SIGINT), "interrupted", 130),
    ],
    ids=["disk full", "SIGTERM", "Ctrl-C"],
)
def test_a_save_that_fails_leaves_the_last_checkpoint_good(
    megatron_run: Run,
    tiny_llama: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    event: Callable[[], None],
    ending: str,
    code: int,
) -> None:
    argv = [*tiny_llama, "--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "2"]
    patches = at_save(4, event)
    try:
        with pytest.raises(SystemExit) as ended:
            errors.run_main(lambda: megatron_run(argv) and None)
    finally:
        patches.undo()
    assert ended.value.code == code
    assert ending in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / TRACKER).read_text() == "2"
    assert not (tmp_path / "iter_0000004").exists()
    resumed = megatron_run(argv)
    assert len(resumed.losses) == 2
    assert (tmp_path / TRACKER).read_text() == "4"


# Training that gets a signal (named second) so many seconds after its first checkpoint is complete.
SIGNALLED = """
import os, signal, sys, threading, time
from megatron_dyt import errors, pretrain

tracker, name, seconds, *argv = sys.argv[1:]

def send():
    while not os.path.exists(tracker):
        time.sleep(0.01)
    time.sleep(float(seconds))
    os.kill(os.getpid(), signal.Signals[name])

threading.Thread(target=send, daemon=True).start()
errors.run_main(lambda: pretrain.main(argv))
"""


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGKILL", -signal.SIGKILL)])
def test_killed_at_any_moment(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, ranks: Parent, name: str, code: int
) -> None:
    """A process that saves after every step is stopped; the run goes on from what it left."""
    saving = ["--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "1"]
    saving += ["--override-opt_param-scheduler"]
    script, out, err = tmp_path / "signalled.py", tmp_path / "out", tmp_path / "err"
    script.write_text(SIGNALLED)
    seconds = np.random.default_rng().uniform(0, 0.5)
    when = [str(tmp_path / TRACKER), name, str(seconds)]
    argv = ["--device", "cpu", *tiny_llama, *saving, "--train-iters", "5000"]
    assert ranks.run([Rank([str(script), *when, *argv], str(out), str(err))], watched=True) == [code]
    if name == "SIGTERM":
        # At its end triton 3.9 may list what it has not freed.
        assert "SIGTERM; the last complete checkpoint is intact\n" in err.read_text()
    done = int((tmp_path / TRACKER).read_text() or max_iteration(tmp_path))
    resumed = megatron_run([*tiny_llama, *saving, "--train-iters", str(done + 1)])
    assert len(resumed.losses) == 1


def max_iteration(save: Path) -> int:
    return max(int(path.parent.name[5:]) for path in save.glob("iter_*/metadata.json"))


@pytest.mark.distributed
def test_two_processes_compute_what_one_computes(
    megatron_run: Run, tiny_llama: list[str], tmp_path: Path, ranks: Parent
) -> None:
    """Tensor and sequence parallel over two processes; their checkpoint goes on in one."""
    argv = [*tiny_llama, "--make-vocab-size-divisible-by", "16"]
    saving = ["--save", str(tmp_path), "--save-interval", "2"]
    split = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    command = ["-m", "megatron_dyt.pretrain", "--device", "cpu"]
    logs = [Rank([*command, *argv, *split, *saving], str(tmp_path / f"log{rank}")) for rank in range(2)]
    codes = ranks.run(logs, watched=True)
    printed = "".join(Path(rank.out).read_text() for rank in logs)
    assert codes == [0, 0], printed[-3000:]
    assert printed.count("CPU runtime (1 threads") == 1
    logged = [float(loss) for loss in re.findall(r"lm loss: (\S+)", printed)]
    one = megatron_run(argv)
    # The second line that Megatron logs is the mean of the first two steps.
    expected = [one.losses[0], sum(one.losses[:2]) / 2, *one.losses[2:]]
    assert logged == pytest.approx(expected, rel=1e-5)
    resumed = megatron_run([*argv, "--load", str(tmp_path), "--ckpt-step", "2"])
    assert resumed.losses == pytest.approx(one.losses[2:], rel=1e-5)


def test_wrong_input_is_one_line_and_code_2(
    megatron_run: Run, tiny_llama: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [word for word in tiny_llama if word != "--mock-data"]
    with pytest.raises(SystemExit) as ended:
        errors.run_main(lambda: megatron_run([*argv, "--data-path", "nowhere"]) and None)
    assert ended.value.code == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "megatron_dyt" in each]
    assert line.startswith("megatron_dyt: error: dataset nowhere: nowhere.idx does not exist")
