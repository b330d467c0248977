"""Real Transformer Engine on a CPU (`make test-te`): its layers are built, saved, and not run."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt.cpu import runtime
from tests.mcore.conftest import make_config, make_latent_config, one_process, save_model

__all__ = ["make_config", "make_latent_config", "save_model"]  # fixtures

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip without the build, which stands in front of .venv so that no other test finds it."""
    found = importlib.util.find_spec("transformer_engine")
    if found is not None and ROOT / ".venv-te" in Path(str(found.origin)).parents:
        return
    reason = "Transformer Engine is not built in (make test-te builds it and runs these)"
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The CPU runtime and the plugin, with Megatron seeing Transformer Engine."""
    with te_on_cpu(init_method=f"file://{tmp_path_factory.mktemp('store') / 'file'}"):
        yield


@contextlib.contextmanager
def te_on_cpu(**options: Any) -> Iterator[None]:
    """`one_process` with these options; the runtime would hide TE, and refuses a process that has it."""
    with pytest.MonkeyPatch.context() as outer:
        outer.setattr(runtime, "_GPU_PACKAGES", ("apex",))
        import transformer_engine.pytorch  # noqa: F401 # before Megatron

        with one_process(**options), pytest.MonkeyPatch.context() as inner:
            # Asked for before a layer is built.
            inner.setattr("torch.cuda.is_available", lambda: True)
            yield


@pytest.fixture
def build_gpt(world: None) -> Callable[..., Any]:
    """A GPTModel of Transformer Engine's layers (`te=True`) or of local ones, from Megatron's own specs."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    def build(config: Any, te: bool) -> Any:
        torch.manual_seed(7)
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=te)
        options = {}
        if config.mtp_num_layers:
            options["mtp_block_spec"] = get_gpt_mtp_block_spec(
                config, block.layer_specs[-1], use_transformer_engine=te
            )
        return GPTModel(
            config,
            block,
            vocab_size=64,
            max_sequence_length=16,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            **options,
        )

    return build
