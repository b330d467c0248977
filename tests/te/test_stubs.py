"""The stand-ins of tests/mcore/te_stubs.py agree with the real classes on a tensor parallel rank of two."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from .conftest import te_on_cpu

INPUT, OUTPUT = 8, 16
LINEAR = {"bias": True, "skip_bias_add": False, "is_expert": False, "tp_comm_buffer_name": "qkv"}
COLUMN = LINEAR | {"gather_output": False}
# Class, and what Megatron gives it beside sizes, config and initialization.
CLASSES: dict[str, dict[str, Any]] = {
    "TELinear": LINEAR | {"parallel_mode": "duplicated", "skip_weight_param_allocation": False},
    "TEColumnParallelLinear": COLUMN,
    "TELayerNormColumnParallelLinear": COLUMN,
    "TERowParallelLinear": LINEAR | {"input_is_parallel": True},
}
# What Megatron reads of parameters, and what it takes where a mark is missing.
MARKS = {
    "tensor_model_parallel": False,
    "partition_dim": -1,
    "partition_stride": 1,
    "allreduce": True,
    "sequence_parallel": False,
}
# What the real ones have besides: the fused norm.
ONLY_REAL = ("layer_norm_weight", "layer_norm_bias")


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with te_on_cpu(tensor_parallel=2, backend="fake", store=FakeStore()):
        yield


@pytest.fixture
def pair(make_config: Callable[..., Any]) -> Callable[..., Any]:
    """`pair(name)`: both classes, with the options of a call."""

    def both(name: str) -> Any:
        from megatron.core.extensions import transformer_engine

        from tests.mcore import te_stubs

        config = make_config("LayerNorm", tensor_model_parallel_size=2, sequence_parallel=True)
        options = {"config": config, "init_method": nn.init.zeros_, **CLASSES.get(name, {})}
        return getattr(transformer_engine, name), getattr(te_stubs, name), options

    return both


def parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in module.named_parameters() if name not in ONLY_REAL}


@pytest.mark.parametrize("name", CLASSES)
def test_weights_are_cut_and_marked_alike(pair: Callable[..., Any], name: str) -> None:
    real, stub, options = pair(name)
    real, stub = real(INPUT, OUTPUT, **options), stub(INPUT, OUTPUT, **options)
    assert real.parallel_mode == stub.parallel_mode
    expected = parameters(real)
    found = parameters(stub)
    assert {n: p.shape for n, p in found.items()} == {n: p.shape for n, p in expected.items()}
    for parameter, mine in found.items():
        marks = [
            {mark: getattr(each, mark, default) for mark, default in MARKS.items()}
            for each in (mine, expected[parameter])
        ]
        assert marks[0] == marks[1], parameter


@pytest.mark.parametrize("name", CLASSES)
def test_checkpoints_have_the_same_pieces(pair: Callable[..., Any], name: str) -> None:
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    real, stub, options = pair(name)
    pieces = [
        {
            key: (piece.global_shape, piece.global_offset, piece.replica_id[1:])
            for key, piece in cls(INPUT, OUTPUT, **options)
            .sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))
            .items()
            if "_extra_state" not in key and key not in ONLY_REAL
        }
        for cls in (real, stub)
    ]
    assert pieces[0] == pieces[1]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("TELinear", {"skip_weight_param_allocation": True}),
        ("TEColumnParallelLinear", {"gather_output": True}),
        ("TEColumnParallelLinear", {"skip_weight_param_allocation": True}),
        ("TELayerNormColumnParallelLinear", {"gather_output": True}),
        ("TELayerNormColumnParallelLinear", {"is_expert": True}),
        ("TERowParallelLinear", {"input_is_parallel": False}),
    ],
    ids=str,
)
def test_the_same_is_refused(pair: Callable[..., Any], name: str, given: dict[str, Any]) -> None:
    *classes, options = pair(name)
    messages = []
    for cls in classes:
        with pytest.raises(ValueError, match="Transformer Engine linear layers do not") as refusal:
            cls(INPUT, OUTPUT, **options | given)
        messages.append(str(refusal.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_norms_have_the_same_parameters(
    pair: Callable[..., Any], make_config: Callable[..., Any], norm: str
) -> None:
    real, stub, _ = pair("TENorm")
    built = [cls(make_config(norm), 8, 1e-5) for cls in (real, stub)]
    shapes = [{name: p.shape for name, p in each.named_parameters()} for each in built]
    assert shapes[0] == shapes[1]
    odd = make_config(norm)
    odd.normalization = "L2Norm"
    for cls in (real, stub):
        with pytest.raises(Exception, match="Only LayerNorm and RMSNorm"):
            cls(odd, 8)


def test_the_provider_names_the_same_classes(world: None) -> None:
    from megatron.core.extensions import transformer_engine_spec_provider

    from tests.mcore import te_stubs

    real, stub = transformer_engine_spec_provider.TESpecProvider(), te_stubs.TESpecProvider()
    for slot in (
        "linear",
        "column_parallel_linear",
        "row_parallel_linear",
        "column_parallel_layer_norm_linear",
    ):
        assert getattr(real, slot)().__name__ == getattr(stub, slot)().__name__, slot
    assert real.layer_norm().__name__ == stub.layer_norm().__name__
    assert real.fuse_layernorm_and_linear() == stub.fuse_layernorm_and_linear()
