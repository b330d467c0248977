"""The CPU runtime: what it replaces works on CPU, and goes away without a trace."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from megatron_dyt import cpu
from megatron_dyt.cpu import replacements
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import register
from megatron_dyt.patching import Replacement


@pytest.fixture
def runtime() -> Iterator[None]:
    cpu.enable()
    yield
    cpu.disable()


def held(row: Replacement) -> object:
    """What the owner of a replaced attribute itself holds."""
    owner, name = row.target()
    return vars(owner).get(name, "inherited")


def test_disable_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    register.unregister()  # Its wrappers are made anew each time one below them goes.
    cpu.enable()  # Imports Megatron, which itself changes PyTorch.
    cpu.disable()
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    jit = sys.modules["megatron.core.jit"]

    def state() -> list[object]:
        return [
            *(held(row) for row in replacements.rows()),
            dict(os.environ),
            torch.compile,
            jit.jit_fuser,
            list(logger.filters),
            torch.get_num_threads(),
            sys.modules.get("transformer_engine", "absent"),
        ]

    before = state()
    cpu.enable()
    replaced = [held(row) for row in replacements.rows()]
    cpu.enable()
    assert cpu.is_enabled()
    assert [held(row) for row in replacements.rows()] == replaced
    assert all(now is not then for now, then in zip(replaced, before, strict=False))
    cpu.disable()
    cpu.disable()
    assert not cpu.is_enabled()
    assert state() == before


def test_no_cuda_device_appears(runtime: None) -> None:
    assert not torch.cuda.is_available()
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0), 0])
def test_tensors_for_cuda_are_made_on_cpu(runtime: None, device: object) -> None:
    made = [
        torch.empty(2, device=device),
        torch.tensor([1.0], device=device),
        torch.zeros_like(torch.ones(2), device=device),
        torch.ones(2).to(device),
        torch.ones(2).to(device=device, dtype=torch.bfloat16),
        torch.ones(2).new_zeros(2, device=device),
        torch.ones(2).cuda(device),
    ]
    assert all(tensor.device.type == "cpu" for tensor in made)
    assert made[4].dtype == torch.bfloat16


def test_other_arguments_mean_what_they_meant(runtime: None) -> None:
    assert torch.empty(2, device="meta").is_meta
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    assert torch.ones(2).to(torch.empty(1, dtype=torch.int8)).dtype == torch.int8
    assert torch.ones(2).type(torch.int32).dtype == torch.int32
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    layer = torch.nn.Linear(2, 2)
    assert layer.cuda() is layer


def test_streams_events_and_memory(runtime: None) -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        start.record()
        torch.cuda.current_stream().wait_event(start)
    torch.cuda.current_stream().record_event(end)
    torch.cuda.synchronize()
    assert end.query()
    assert torch.cuda.current_stream().query()
    assert start.elapsed_time(end) > 0
    assert 0 < torch.cuda.memory_allocated() < torch.cuda.get_device_properties(0).total_memory
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] > 0
    assert torch.cuda.memory_stats()["never heard of"] == 0
    assert torch.cuda.get_device_capability() == (0, 0)
    assert not torch.cuda.is_current_stream_capturing()


def test_random_state_is_the_cpu_generator(runtime: None) -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_named_random_states_are_independent(runtime: None, caplog: pytest.LogCaptureFixture) -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("one", 1)
    tracker.add("two", 2)

    def draw(name: str) -> torch.Tensor:
        with tracker.fork(name):
            return torch.rand(2)

    outside = torch.get_rng_state()
    drawn = [draw("one"), draw("two"), draw("one")]
    assert torch.equal(torch.get_rng_state(), outside)
    torch.manual_seed(1)
    assert torch.equal(torch.cat([drawn[0], drawn[2]]), torch.rand(4))
    assert "CPU RNG state changed" not in caplog.text


def test_what_is_being_sent_outlives_its_tensor(runtime: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron 0.17 frees an output while it is on its way to the next stage."""
    from megatron.core.pipeline_parallel import p2p_communication as p2p

    sent: list[torch.Tensor] = []
    monkeypatch.setattr(torch.distributed, "isend", lambda tensor, **_: sent.append(tensor))
    monkeypatch.setattr(torch.distributed, "get_backend", lambda _group: "gloo")
    output, gradient = torch.arange(4.0), torch.arange(4.0, 8.0)
    p2p._p2p_ops(
        tensor_send_prev=gradient,
        tensor_recv_prev=None,
        tensor_send_next=output,
        tensor_recv_next=None,
        group=SimpleNamespace(size=lambda: 4, rank=lambda: 2),
        prev_pipeline_rank=1,
        next_pipeline_rank=3,
    )
    where = output.data_ptr()
    output.data = torch.empty(1)
    assert sent[0].data_ptr() == where  # Not a copy.
    assert [tensor.tolist() for tensor in sent] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_pytorchs_norms_are_marked_for_sequence_parallelism(runtime: None, kind: str) -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    def build(sequence_parallel: bool) -> torch.nn.Module:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            normalization=kind,
            tensor_model_parallel_size=2,
            sequence_parallel=sequence_parallel,
        )
        norm = WrappedTorchNorm(config, 8)
        assert config.sequence_parallel == sequence_parallel
        return norm

    split, whole = build(True), build(False)
    assert type(split) is type(whole) is getattr(torch.nn, kind)
    assert all(parameter.sequence_parallel for parameter in split.parameters())
    assert not any(hasattr(parameter, "sequence_parallel") for parameter in whole.parameters())


def test_a_process_that_uses_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="already uses CUDA"):
        cpu.enable()
    assert not cpu.is_enabled()


def test_an_imported_gpu_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", sys)
    with pytest.raises(UserError, match="apex, which needs a GPU, is already imported"):
        cpu.enable()


def test_gpu_packages_are_hidden_from_megatron(runtime: None) -> None:
    with pytest.raises(ImportError):
        __import__("transformer_engine")


def test_a_failed_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.empty
    broken = [*replacements.rows(), Replacement("torch", "no_such_thing", lambda old: old)]
    monkeypatch.setattr(replacements, "rows", lambda: broken)
    with pytest.raises(RuntimeError, match=r"torch\.no_such_thing"):
        cpu.enable()
    assert not cpu.is_enabled()
    assert torch.empty is original
    assert sys.modules.get("transformer_engine", "absent") == "absent"


def test_a_lone_process_gets_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cpu.enable()
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
        cpu.disable()
        assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        cpu.enable()
        assert torch.get_num_threads() == 1
    finally:
        cpu.disable()
        torch.set_num_threads(threads)


def test_a_device_context_still_places_tensors() -> None:
    """In a process of its own: PyTorch keeps what it finds at the first use of such a context."""
    program = """
import torch
from megatron_dyt import cpu
cpu.enable()
with torch.device("meta"):
    print(torch.empty(2).device, torch.nn.Linear(2, 2).weight.device)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[-2:] == ["meta", "meta"]
