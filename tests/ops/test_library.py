"""`dyt`, `dyt_residual` and `dyt_fork` under torch's modes, transforms, compiler and checkpointing.

Where something looks on it sees the operations; elsewhere their code runs at once, with equal results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_dyt.ops import dyt, dyt_fork, dyt_residual

CALLS: dict[str, Callable[..., Any]] = {
    "dyt": dyt,
    "dyt_residual": lambda x, *rest: dyt_residual(x, 2 * x, *rest),
    "dyt_fork": dyt_fork,
}


class Recorder(TorchDispatchMode):
    """Names of the operations that were called, of our library alone."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "megatron_dyt":
            self.names.append(func._schema.name.removeprefix("megatron_dyt::"))
        return func(*args, **(kwargs or {}))


def inputs(rows: int = 5) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(rows, 7), torch.tensor([0.5]), torch.randn(7), torch.randn(7)]
    return [tensor.requires_grad_() for tensor in tensors]


def loss_of(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((i + 1) * output.sin().sum() for i, output in enumerate(outputs))  # type: ignore[return-value]


def run(call: Callable[..., Any], rows: int = 5) -> list[Tensor]:
    """Gradients, then results."""
    tensors = inputs(rows)
    outputs = call(*tensors)
    gradients = torch.autograd.grad(loss_of(outputs), tensors)
    return [*gradients, *(outputs if isinstance(outputs, tuple) else [outputs])]


@pytest.mark.parametrize("name", CALLS)
def test_a_dispatch_mode_sees_the_operations_and_changes_nothing(name: str) -> None:
    unobserved = run(CALLS[name])
    with Recorder() as recorder:
        observed = run(CALLS[name])
    assert recorder.names == ["dyt_residual" if name == "dyt_residual" else "dyt", "dyt_backward"]
    for one, other in zip(unobserved, observed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_called_through_the_dispatcher_where_nothing_looks_on(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise AssertionError("an operation was called")

    for operation in ("dyt", "dyt_residual", "dyt_backward"):
        monkeypatch.setattr(getattr(torch.ops.megatron_dyt, operation), "default", fail)
    run(CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors(name: str) -> None:
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(tensor) for tensor in inputs()]
    outputs = CALLS[name](*tensors)  # Outside the mode: their type alone tells.
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    assert first.shape == (5, 7)
    assert type(first) is type(tensors[0])
    assert [g.shape for g in torch.autograd.grad(first.sum(), tensors)] == [t.shape for t in tensors]


@pytest.mark.parametrize("name", CALLS)
def test_compiles_into_one_graph_with_equal_results(name: str) -> None:
    def layer(x: Tensor, *parameters: Tensor) -> Any:
        return CALLS[name](torch.sin(x), *parameters)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (6, 9, 17):  # The second compilation is for any number of rows.
        for one, other in zip(run(layer, rows), run(compiled, rows), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_activation_checkpointing_changes_nothing(name: str, use_reentrant: bool) -> None:
    tensors = inputs()
    loss_of(checkpoint(CALLS[name], *tensors, use_reentrant=use_reentrant)).backward()
    for tensor, expected in zip(tensors, run(CALLS[name]), strict=False):
        assert torch.equal(tensor.grad, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_are_refused(name: str) -> None:
    tensors = inputs()
    (dx,) = torch.autograd.grad(loss_of(CALLS[name](*tensors)), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


class Watched(torch.Tensor):
    """A subclass that records our operations which are called with it, on what it wraps."""

    names: list[str]
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Watched:
        outer: Watched = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.names.append(func._schema.name)
        plain = [arg.inner if isinstance(arg, Watched) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


@pytest.mark.parametrize("watched", range(4))
@pytest.mark.parametrize("name", CALLS)
def test_a_subclass_as_any_argument_sees_the_operation(name: str, watched: int) -> None:
    tensors = [tensor.detach() for tensor in inputs()]
    tensors[watched] = Watched(tensors[watched])
    Watched.names = []
    CALLS[name](*tensors)
    assert Watched.names[-1 if name != "dyt_fork" else 0].startswith("megatron_dyt::dyt")


FUNCTIONAL = {
    "grad": lambda f, t: torch.func.grad(lambda x: f(x).sum())(t[0]),
    "jvp": lambda f, t: torch.func.jvp(f, (t[0],), (torch.ones_like(t[0]),))[1],
    "vmap": lambda f, t: torch.func.vmap(f)(t[0]),
    "hessian": lambda f, t: torch.func.hessian(lambda x: f(x).sum())(t[0]),
    "forward mode": lambda f, t: forward_mode(f, t[0]),
}


def forward_mode(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.parametrize("transform", FUNCTIONAL)
@pytest.mark.parametrize("name", CALLS)
def test_transforms_and_forward_mode(name: str, transform: str) -> None:
    tensors = [tensor.detach().double() for tensor in inputs()]

    def result_of(call: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def one(x: Tensor) -> Tensor:
            outputs = call(x, *tensors[1:])
            return outputs[0] if isinstance(outputs, tuple) else outputs

        return one

    def in_torch(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return weight * torch.tanh(alpha * (3 * x if name == "dyt_residual" else x)) + bias

    found, expected = (FUNCTIONAL[transform](result_of(call), tensors) for call in (CALLS[name], in_torch))
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("call", [dyt, dyt_residual, dyt_fork])
def test_transforms_keep_what_is_promised(call: Callable[..., Any]) -> None:
    x, *parameters = (tensor.detach() for tensor in inputs())
    args = [x.T.contiguous().T] * (2 if call is dyt_residual else 1) + parameters
    with forward_ad.dual_level():
        outputs = call(*args)
        assert (outputs[0] if isinstance(outputs, tuple) else outputs).is_contiguous()
        with pytest.raises(ValueError, match="backend is 'cuda'"):
            call(*args, backend="cuda")
