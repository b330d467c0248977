"""`dyt_fork`: DyT of x, and x, with the gradients of both added where DyT's is computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_dyt.ops import backends, dyt, dyt_fork
from tests.ops.cases import make_inputs, needs_cpu_kernels, split, upstream

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
Use = Callable[[Tensor, Tensor], Tensor]


def both(y: Tensor, same: Tensor) -> Tensor:
    return y.square() + same * y + 3 * same


USES: dict[str, Use] = {"both": both, "output": lambda y, same: y.sin(), "input": lambda y, same: same.sin()}


def gradients(inputs: dict[str, Tensor], function: str, use: Use, *, forked: bool) -> list[Tensor | None]:
    """Of all inputs, through `dyt_fork` or through `dyt` beside another use of x."""

    x, (alpha, weight, bias, shift, _) = split(inputs, function)
    call = dyt_fork if forked else lambda *args, **options: (dyt(*args, **options), x)
    result = use(*call(x, alpha, weight, bias, function=function, shift=shift))
    return list(torch.autograd.grad(result, list(inputs.values()), upstream(result), allow_unused=True))


@pytest.mark.parametrize("function", ["tanh", "erf", "isru"])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_two_uses_of_x(dtype: torch.dtype, use: Use, function: str) -> None:
    inputs = make_inputs((5, 3, 12), function=function, dtype=dtype, parameter_dtype=torch.float32)
    expected = gradients(inputs, function, use, forked=False)
    # One rounding of the sum, or two.
    eps = torch.finfo(dtype).eps
    for name, actual, e in zip(inputs, gradients(inputs, function, use, forked=True), expected, strict=True):
        assert (actual is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(actual, e, rtol=2 * eps, atol=2 * eps * e.abs().max().item(), msg=name)


@pytest.mark.parametrize("frozen", [("x",), ("alpha", "weight", "bias")])
def test_frozen_inputs(frozen: tuple[str, ...]) -> None:
    inputs = make_inputs()
    for name in frozen:
        inputs[name].requires_grad_(False)
    both(*dyt_fork(*inputs.values())).sum().backward()
    found = {name: t.grad for name, t in inputs.items()}
    for tensor in inputs.values():
        tensor.grad = None
    both(dyt(*inputs.values()), inputs["x"]).sum().backward()
    for name, tensor in inputs.items():
        torch.testing.assert_close(found[name], tensor.grad, rtol=1e-6, atol=1e-6, msg=name)


def test_the_second_result_is_x_and_takes_no_memory() -> None:
    inputs = make_inputs()
    y, same = dyt_fork(*inputs.values())
    assert same.data_ptr() == inputs["x"].data_ptr()
    assert torch.equal(y, dyt(*inputs.values()))
    assert same.grad_fn is y.grad_fn
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y, same = dyt_fork(*inputs.values())
            assert same is inputs["x"]
            assert torch.equal(y, dyt(*inputs.values()))


@needs_cpu_kernels
def test_one_backward_call_adds_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor | None] = []
    cpu = backends.IMPLEMENTATIONS["cpu"]

    def spy(*args: object) -> list[Tensor]:
        seen.append(args[-1])  # type: ignore[arg-type]
        return cpu.backward(*args)

    monkeypatch.setitem(backends.IMPLEMENTATIONS, "cpu", cpu._replace(backward=spy))
    y, same = dyt_fork(*make_inputs().values())
    dsame = upstream(y) + 1
    torch.autograd.backward([y, same], [upstream(y), dsame])
    assert [torch.equal(t, dsame) for t in seen if t is not None] == [True]


def test_autocast_leaves_it_alone() -> None:
    inputs = make_inputs(dtype=torch.bfloat16, parameter_dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, same = dyt_fork(*inputs.values())
    assert y.dtype == same.dtype == torch.bfloat16
    assert torch.equal(y, dyt(*inputs.values()))


def test_bad_input_is_refused_as_for_dyt() -> None:
    x, one = torch.ones(2, 4), torch.ones(1)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\)"):
        dyt_fork(x, one, torch.ones(3))
    with pytest.raises(ValueError, match="no shift was given with function='erf'"):
        dyt_fork(x, one, torch.ones(4), function="erf")
