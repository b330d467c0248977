"""What the flags need on a GPU is missed before Megatron builds a model."""

import importlib.util
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.training import gpu_needs
from tests.megatron_args import arguments as megatron_arguments

EXTENSIONS = ("fused_weight_gradient_mlp_cuda", "scaled_masked_softmax_cuda")


def arguments(**given: Any) -> Namespace:
    """Megatron's defaults, for a DyT model with RoPE in bf16."""
    model = {"normalization": "DyT", "position_embedding_type": "rope", "bf16": True}
    return megatron_arguments(**model | {"sequence_parallel": True} | given)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`install("transformer_engine", ...)`: these are there, the others are not."""
    find = importlib.util.find_spec

    def install(*names: str) -> None:
        for name in EXTENSIONS:
            monkeypatch.setitem(sys.modules, name, ModuleType(name) if name in names else None)
        te = ModuleSpec("transformer_engine", None) if "transformer_engine" in names else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: te if name == "transformer_engine" else find(name)
        )

    return install


def first_words(args: Namespace) -> list[str]:
    return [line.split(" (the default)")[0] for line in gpu_needs.missing(args)]


def test_nothing_is_missing_where_everything_is_there(install: Callable[..., None]) -> None:
    install("transformer_engine", *EXTENSIONS)
    assert gpu_needs.missing(arguments()) == []


def test_transformer_engine_does_not_bring_apex(install: Callable[..., None]) -> None:
    install("transformer_engine")
    (line,) = gpu_needs.missing(arguments())
    assert line.startswith("gradient accumulation fusion (the default): apex's extension fused_weight_")
    assert "Give --no-gradient-accumulation-fusion" in line
    assert gpu_needs.missing(arguments(gradient_accumulation_fusion=False)) == []


def test_an_extension_that_does_not_load_is_missing(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """One for another torch is found, and does not import."""
    install("transformer_engine")
    monkeypatch.delitem(sys.modules, "fused_weight_gradient_mlp_cuda")
    (tmp_path / "fused_weight_gradient_mlp_cuda.so").write_bytes(b"no library")
    monkeypatch.syspath_prepend(tmp_path)
    assert first_words(arguments()) == ["gradient accumulation fusion"]
    assert gpu_needs.fusion_flags() == ["--no-gradient-accumulation-fusion"]


def test_without_both_everything_is_named_at_once(install: Callable[..., None]) -> None:
    install()
    expected = ["--transformer-impl transformer_engine", "gradient accumulation fusion", "RoPE fusion"]
    assert first_words(arguments()) == expected
    with pytest.raises(UserError, match=r"transformer_impl|--transformer-impl local\. .*--no-rope-fusion"):
        gpu_needs.check(arguments())


@pytest.mark.parametrize(
    "given", [{"position_embedding_type": "learned_absolute"}, {"multi_latent_attention": True}], ids=str
)
def test_rope_fusion_is_not_wanted_without_its_rope(given: Any, install: Callable[..., None]) -> None:
    install()
    assert "RoPE fusion" not in first_words(arguments(**given))


def test_local_layers_want_more_and_torchs_norm_less(install: Callable[..., None]) -> None:
    install("transformer_engine")
    local = arguments(transformer_impl="local", gradient_accumulation_fusion=False)
    assert first_words(local) == ["masked softmax fusion"]
    local.bf16 = False
    assert first_words(local) == []
    local.normalization = "RMSNorm"
    lines = gpu_needs.missing(local)
    assert [line.split(": ")[0] for line in lines] == [
        "a persistent norm kernel (the default) with --transformer-impl local",
        "--sequence-parallel with --transformer-impl local",
    ]


REFUSALS = """
from argparse import Namespace

from megatron.core.tensor_parallel import layers
from megatron.core.transformer.torch_norm import WrappedTorchNorm

assert layers._grad_accum_fusion_available is False
plain = {"normalization": "RMSNorm", "layernorm_zero_centered_gamma": False}
plain |= {"memory_efficient_layer_norm": False, "persist_layer_norm": False, "sequence_parallel": False}
WrappedTorchNorm(Namespace(**plain), 4)
for name in ("persist_layer_norm", "sequence_parallel"):
    try:
        WrappedTorchNorm(Namespace(**plain | {name: True}), 4)
    except AssertionError as error:
        print(name, error)
"""


@pytest.mark.needs("training_loop")
def test_megatron_refuses_the_same() -> None:
    """Its own layer and norm, in a process with neither the CPU runtime nor a fake extension."""
    ended = subprocess.run([sys.executable, "-c", REFUSALS], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    refused = re.findall(r"^(\w+) .*not supported by torch", ended.stdout, re.MULTILINE)
    assert refused == ["persist_layer_norm", "sequence_parallel"]
