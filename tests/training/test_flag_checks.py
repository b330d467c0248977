"""Flags that cannot work: refused as Megatron's parser has them, and only where Megatron fails too."""

import sys

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.training import flag_checks

pytestmark = pytest.mark.needs("training_loop")


def check(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import parse_args

    monkeypatch.setattr(sys, "argv", ["pretrain", *flags])
    flag_checks.check(parse_args())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-query-groups 3", "--num-query-groups 3 does not divide --num-attention-heads 4.*1, 2, 4"),
        ("--num-attention-heads 6", "--num-query-groups 2"),
        ("--tensor-model-parallel-size 3", "--tensor-model-parallel-size 3 does not divide --num-attention"),
        ("--tensor-model-parallel-size 2 --ffn-hidden-size 65", "does not divide --ffn-hidden-size 65"),
        ("--kv-channels 7", "--kv-channels 7 is odd"),
        ("--num-experts 2 --moe-router-topk 3", "--moe-router-topk 3 is more than --num-experts 2"),
        ("--lr-warmup-iters 4", "--lr-warmup-iters 4 is not shorter.*--train-iters 4 ends.*--lr-decay-iters"),
        ("--lr-warmup-iters 3 --lr-decay-iters 2", "--lr-decay-iters 2 ends"),
        ("--lr-warmup-fraction 1", "--lr-warmup-fraction 1.0 is not shorter"),
        ("--lr-decay-style WSD", "needs --lr-wsd-decay-iters"),
        ("--lr-decay-iters 0", "--lr-decay-iters 0 cannot be"),
        ("--seq-length 0", "--seq-length 0 cannot be"),
        ("--log-interval 0", "--log-interval 0 cannot be"),
        ("--tensor-model-parallel-size 0", "cannot be"),
        ("--hidden-dropout 2", "--hidden-dropout 2.0 is no probability"),
        ("--enable-full-sharding-in-hsdp", "ignores --enable-full.*Give that"),
        ("--openai-gelu", "ignores --openai-gelu: "),
        ("--apply-residual-connection-post-layernorm", "ignores --apply-residual"),
        ("--optimizer muon --use-distributed-optimizer", "in fp32.*Add --bf16"),
    ],
)
def test_what_cannot_work_is_refused_by_its_flags(
    tiny_llama: list[str], monkeypatch: pytest.MonkeyPatch, flags: str, words: str
) -> None:
    argv = [*tiny_llama, *flags.split()]
    if flags == "--num-attention-heads 6":
        argv += ["--num-query-groups", "4"]
        words = "--num-query-groups 4 does not divide --num-attention-heads 6"
    with pytest.raises(UserError, match=words):
        check(argv, monkeypatch)


@pytest.mark.parametrize(
    ("without", "words"),
    [
        ("--lr", "--lr RATE is missing"),
        ("--train-iters", "--train-iters N is missing"),
        ("--group-query-attention", "--num-query-groups 2 was given without --group-query-attention"),
    ],
)
def test_what_is_missing_is_named(
    tiny_llama: list[str], monkeypatch: pytest.MonkeyPatch, without: str, words: str
) -> None:
    where = tiny_llama.index(without)
    rest = tiny_llama[where + (1 if without == "--group-query-attention" else 2) :]
    with pytest.raises(UserError, match=words):
        check([*tiny_llama[:where], *rest], monkeypatch)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--kv-channels 7 --rotary-percent 0.5",
        "--kv-channels 7 --position-embedding-type learned_absolute",
        "--lr-warmup-iters 3",
        "--lr-warmup-iters 4 --lr-decay-iters 5",
        "--train-iters 0 --skip-train",
        "--num-experts 3 --moe-router-topk 3",
        "--optimizer muon",
        "--optimizer muon --use-distributed-optimizer --bf16",
        "--use-checkpoint-args --num-query-groups 3 --load x",
    ],
)
def test_what_works_passes(tiny_llama: list[str], monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    check([*tiny_llama, *flags.split()], monkeypatch)


@pytest.mark.needs("step_batch_size")
def test_a_ramp_of_the_batch_size_that_is_ignored_is_refused(
    tiny_llama: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "ignores --rampup-batch-size 2 2 8: .*--step-batch-size-schedule"
    with pytest.raises(UserError, match=words):
        check([*tiny_llama, "--rampup-batch-size", "2", "2", "8"], monkeypatch)
