"""Flags that a CPU cannot honour are changed and named, or refused when they change the numbers."""

import os
from argparse import Namespace

import pytest

from megatron_dyt.cpu import flags
from megatron_dyt.errors import UserError


def test_only_what_cannot_work_is_changed_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    args = Namespace(
        distributed_backend="nccl",
        transformer_impl="local",
        gradient_accumulation_fusion=True,
        no_persist_layer_norm=False,
        cuda_graph_impl=None,
        bias_swiglu_fusion=True,
        seed=3,
    )
    changed = flags.adjust(args)
    assert changed == [
        "--distributed-backend gloo",
        "--no-gradient-accumulation-fusion",
        "--no-persist-layer-norm",
    ]
    assert vars(args) == {
        "distributed_backend": "gloo",
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "no_persist_layer_norm": True,
        "cuda_graph_impl": None,
        "bias_swiglu_fusion": True,
        "seed": 3,
    }
    assert f"set {' '.join(changed)}\n" in capsys.readouterr().out
    assert flags.adjust(args) == []
    assert "set no flags" in capsys.readouterr().out


def test_the_async_writer_is_chosen_where_there_is_one() -> None:
    assert flags.adjust(Namespace(async_save=False, async_strategy="nvrx")) == []
    args = Namespace(async_save=True, async_strategy="nvrx")
    assert flags.adjust(args) == ["--async-strategy mcore"]
    assert (args.async_save, args.async_strategy) == (True, "mcore")


def test_megatron_fsdp_has_its_own_number_of_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron refuses 1 with it, and anything else with tensor parallelism."""
    monkeypatch.setenv(flags.CONNECTIONS, "1")
    args = Namespace(use_megatron_fsdp=True, save=None, gradient_reduce_div_fusion=True)
    assert flags.adjust(args) == ["--no-gradient-reduce-div-fusion"]
    assert os.environ[flags.CONNECTIONS] != "1"
    assert flags.adjust(Namespace(use_megatron_fsdp=False, gradient_reduce_div_fusion=True)) == []
    assert os.environ[flags.CONNECTIONS] == "1"


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert flags.adjust(Namespace(tp_comm_overlap=True)) == ["no --tp-comm-overlap"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"fp8": "hybrid"}, "--fp8-format was given"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2 was given"),
        ({"context_parallel_size": 2}, "--context-parallel-size 2 needs"),
        ({"use_megatron_fsdp": True, "save": "here"}, "--save was given with --use-megatron-fsdp"),
    ],
)
def test_what_needs_a_gpu_is_refused(given: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        flags.adjust(Namespace(**given))
