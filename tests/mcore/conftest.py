"""A world of one CPU process with the plugin registered, and GPT models built in it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dyt import cpu
from tests import families


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """CPU runtime on, plugin registered, model parallel groups of size 1."""
    with one_process(init_method=f"file://{tmp_path_factory.mktemp('store') / 'file'}"):
        yield


@contextlib.contextmanager
def one_process(tensor_parallel: int = 1, backend: str = "gloo", **group: Any) -> Iterator[None]:
    """What `world` says, with options of the process group; with backend "fake" rank 0 of several."""
    cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    import megatron_dyt

    megatron_dyt.register()
    dist.init_process_group(backend, rank=0, world_size=tensor_parallel, **group)
    parallel_state.initialize_model_parallel(tensor_parallel, create_gloo_process_groups=backend == "gloo")
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    from megatron_dyt.mcore.register import unregister

    unregister()
    cpu.disable()


@pytest.fixture
def make_config(world: None) -> Callable[..., Any]:
    """A small LLaMA-like TransformerConfig; keywords override."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    def make(normalization: str = "DyT", **overrides: Any) -> Any:
        values = families.SIZES | {
            "num_query_groups": 2,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "add_bias_linear": False,
            "normalization": normalization,
        }
        return TransformerConfig(**(values | overrides))

    return make


@pytest.fixture
def make_latent_config(world: None) -> Callable[..., Any]:
    """A small MLATransformerConfig with norms on both latents; keywords override."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    def make(**overrides: Any) -> Any:
        values = families.SIZES | families.LATENT | {"normalization": "DyT", "transformer_impl": "local"}
        return MLATransformerConfig(**(values | overrides))

    return make


@pytest.fixture
def make_spec() -> Callable[[Any], Any]:
    """Megatron's local layer spec for a config."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    def make(config: Any, **overrides: Any) -> Any:
        return get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=config.normalization,
            **overrides,
        )

    return make


@pytest.fixture
def build_gpt(make_spec: Callable[..., Any]) -> Callable[..., Any]:
    """A GPTModel from a config, its weights the same at every call."""
    from megatron.core.models.gpt import GPTModel

    def build(config: Any, *, spec: Any = None, **options: Any) -> Any:
        torch.manual_seed(7)
        return GPTModel(
            config,
            spec or make_spec(config),
            vocab_size=options.pop("vocab_size", 64),
            max_sequence_length=16,
            position_embedding_type=options.pop("position_embedding_type", "rope"),
            share_embeddings_and_output_weights=options.pop("tied", False),
            **options,
        )

    return build


@pytest.fixture
def loss_of() -> Callable[[Any], torch.Tensor]:
    """Mean loss of a GPTModel on fixed tokens."""
    return functools.partial(families.loss_of, "gpt")


@pytest.fixture
def save_model() -> Callable[[Any, Path], None]:
    """Save a model's parameters as a torch_dist checkpoint."""
    from megatron.core import dist_checkpointing

    def save(model: Any, directory: Path) -> None:
        directory.mkdir()
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(directory))

    return save


@pytest.fixture
def nothing_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged once per process was not yet."""
    from megatron_dyt.mcore import ranks

    monkeypatch.setattr(ranks, "_logged", set())


@pytest.fixture
def start_lines(capsys: pytest.CaptureFixture[str]) -> Callable[[Any], list[str]]:
    """What a Monitor logs at the start of a run."""

    def read(monitor: Any) -> list[str]:
        capsys.readouterr()
        monitor.log_start()
        return [line.removeprefix("megatron_dyt: ") for line in capsys.readouterr().out.splitlines()]

    return read


@pytest.fixture
def te_stubs(world: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Transformer Engine's classes played by the local ones (the module `te_stubs`)."""
    # Not at the top: it imports Megatron, which the CPU runtime wants to do first.
    from tests.mcore import te_stubs as module

    module.install(monkeypatch)
    return module
