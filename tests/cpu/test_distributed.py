"""Communication on CPU: even parts reach PyTorch as made; tests/distributed has uneven ones and training."""

import contextlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dyt.cpu import distributed

REPLACED = {
    "all_gather": distributed.one_by_one_where_uneven,
    "reduce_scatter": distributed.reduced_one_by_one_where_uneven,
}


@pytest.mark.parametrize("name", REPLACED)
def test_arguments_are_passed_on_by_place_and_by_name(name: str) -> None:
    original = inspect.unwrap(getattr(dist, name))
    seen: list[dict[str, Any]] = []

    def record(*args: Any, **kwargs: Any) -> str:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        seen.append(dict(bound.arguments))
        return "work"

    replaced = REPLACED[name](record)
    whole, part = [torch.zeros(2), torch.zeros(2)], torch.ones(2)
    tensors = (whole, part) if name == "all_gather" else (part, whole)
    options = {"group": "some", "async_op": True}
    if name == "reduce_scatter":
        options = {"op": dist.ReduceOp.MAX, **options}

    assert replaced(*tensors) == "work"
    assert replaced(*tensors, *options.values()) == "work"
    assert replaced(*tensors, **options) == "work"
    defaults, by_place, by_name = seen
    assert by_place == by_name
    assert {key: by_name[key] for key in options} == options
    assert defaults["group"] is None


def test_coalesced_collectives_have_finished_when_their_block_is_left() -> None:
    asked: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[str]:
        asked.append((group, device, async_ops))
        yield "works"

    with distributed.waiting_at_its_end(manager)("group", async_ops=True) as works:
        assert works == "works"
    assert asked == [("group", None, False)]


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


def test_meshes_are_of_cpu_processes() -> None:
    seen: list[tuple[Any, ...]] = []
    original = SimpleNamespace(from_group=lambda *given, **options: seen.append((*given, options)))
    mesh = distributed.meshes_on_cpu(original)
    mesh.from_group("groups", device_type="cuda", mesh_dim_names=["dp", "tp"])
    assert seen == [("groups", "cpu", {"mesh_dim_names": ["dp", "tp"]})]


def test_the_device_has_a_number_while_it_is_built() -> None:
    before = torch.cuda.current_device
    seen = []

    def init(_self: Any, text: str) -> None:
        seen.append(torch.device(f"{text}:{torch.cuda.current_device()}"))

    distributed.with_a_numbered_device(init)(None, "cuda")
    assert seen == [torch.device("cuda:0")]
    assert torch.cuda.current_device is before
