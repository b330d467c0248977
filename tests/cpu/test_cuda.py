"""What `torch.cuda` answers on CPU, and where tensors for a CUDA device go."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("runtime")


def test_no_cuda_device_appears() -> None:
    assert not torch.cuda.is_available()
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda", 0), 0])
def test_tensors_for_cuda_are_made_on_cpu(device: object) -> None:
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


def test_other_arguments_mean_what_they_meant() -> None:
    assert torch.empty(2, device="meta").is_meta
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    assert torch.ones(2).to(torch.empty(1, dtype=torch.int8)).dtype == torch.int8
    assert torch.ones(2).type(torch.int32).dtype == torch.int32
    assert torch.ones(2).type() == "torch.cuda.FloatTensor"
    layer = torch.nn.Linear(2, 2)
    assert layer.cuda() is layer


def test_streams_events_and_memory() -> None:
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


def test_random_state_is_the_cpu_generator() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_named_random_states_are_independent(caplog: pytest.LogCaptureFixture) -> None:
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
