"""Providers for Megatron Bridge: their settings reach the model, through everything Bridge does with them.

Bridge itself needs Transformer Engine. Its two modules that matter here do not, and are used when it is
installed, or when MEGATRON_BRIDGE names the folder that holds its `megatron/bridge`; without that, a
stand-in with the same shape takes the place of its `GPTModelProvider`.
"""

import copy
import dataclasses
import importlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_dyt import cpu
from megatron_dyt.config import DyTConfig
from megatron_dyt.errors import UserError
from tests.mcore.conftest import loss_of, world

__all__ = ["loss_of", "world"]  # fixtures

SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "seq_length": 16}
OURS = "megatron_dyt.bridge"
# What the stand-in has been told to read from YAML.
ALLOWED: list[str] = []


def real_bridge() -> Path | None:
    """The folder of `megatron.bridge`, if there is one."""
    given = os.environ.get("MEGATRON_BRIDGE")
    if given:
        return Path(given) / "megatron" / "bridge"
    import megatron

    folders = [Path(folder) / "bridge" for folder in megatron.__path__]
    return next((folder for folder in folders if (folder / "models").is_dir()), None)


def package(name: str, *path: str, **attributes: Any) -> ModuleType:
    """A package without its `__init__`, which would import all of Bridge."""
    module = ModuleType(name)
    module.__path__ = list(path)
    vars(module).update(attributes)
    return module


def stand_in_provider() -> type:
    """As Bridge's: Megatron's TransformerConfig with its `__post_init__` put off to `finalize`."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    @dataclasses.dataclass
    class GPTModelProvider(TransformerConfig):
        share_embeddings_and_output_weights: bool = True
        position_embedding_type: str = "learned_absolute"
        rotary_base: int = 10000
        seq_length: int = 1024
        vocab_size: int | None = None
        should_pad_vocab: bool = False
        normalization: str = "LayerNorm"
        transformer_layer_spec: Any = None

        def __post_init__(self) -> None:
            pass

        def finalize(self) -> None:
            TransformerConfig.__post_init__(self)

        def provide(self, pre_process: bool = True, post_process: bool = True) -> Any:
            return GPTModel(
                self,
                get_gpt_layer_local_spec(normalization=self.normalization),
                vocab_size=self.vocab_size,
                max_sequence_length=self.seq_length,
                position_embedding_type=self.position_embedding_type,
                share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
                pre_process=pre_process,
                post_process=post_process,
            )

    return GPTModelProvider


def forget_bridge() -> None:
    for name in [each for each in sys.modules if each.startswith(("megatron.bridge", OURS))]:
        del sys.modules[name]


@pytest.fixture(scope="module", params=["stand-in", "real"])
def bridge(request: pytest.FixtureRequest, world: None) -> Iterator[Any]:
    """Our module on top of Bridge, or of the stand-in."""
    folder = real_bridge()
    if request.param == "real":
        if folder is None:
            pytest.skip("Megatron Bridge is not installed, and MEGATRON_BRIDGE is not set")
        modules = [package("megatron.bridge", str(folder))]
        modules.append(package("megatron.bridge.models", str(folder / "models")))
    else:
        provider = package("megatron.bridge.models.gpt_provider", GPTModelProvider=stand_in_provider())
        utils = package("megatron.bridge.utils.instantiate_utils")
        utils.register_allowed_target_prefix = ALLOWED.append
        modules = [package("megatron.bridge"), package("megatron.bridge.models"), provider]
        modules += [package("megatron.bridge.utils", instantiate_utils=utils), utils]
    forget_bridge()
    sys.modules.update({module.__name__: module for module in modules})
    yield importlib.import_module(OURS)
    forget_bridge()


@pytest.fixture
def build(bridge: Any) -> Callable[[Any], torch.nn.Module]:
    """A finalized provider's model."""

    def provide(provider: Any) -> torch.nn.Module:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.process_groups_config import ProcessGroupCollection

        provider.use_cpu_initialization = True
        provider.transformer_layer_spec = get_gpt_layer_local_spec(normalization=provider.normalization)
        provider.finalize()
        provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        torch.manual_seed(7)
        model: torch.nn.Module = provider.provide(pre_process=True, post_process=True)
        return model

    return provide


def alphas(model: torch.nn.Module) -> dict[str, float]:
    named = model.named_parameters()
    return {name.split(".")[-2]: round(p.item(), 6) for name, p in named if name.endswith(".alpha")}


def test_settings_reach_the_model(bridge: Any, build: Any, loss_of: Any) -> None:
    provider = bridge.DyTGPTModelProvider(**SMALL, dyt_preset="unit", dyt_alpha_init_final=0.4)
    model = build(provider)
    expected = {"input_layernorm": 0.5, "pre_mlp_layernorm": 0.25, "final_layernorm": 0.4}
    assert alphas(model) == expected
    assert provider.dyt == DyTConfig.unit(32, alpha_final=0.4)
    loss_of(model).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_overrides_between_construction_and_finalize_count(bridge: Any) -> None:
    provider = bridge.DyTGPTModelProvider(**SMALL)
    provider.hidden_size, provider.dyt_bias = 8192, True
    provider.finalize()
    provider.dyt_alpha_init_attn = 0.3
    provider.finalize()
    assert provider.dyt == DyTConfig.auto(8192, bias=True, alpha_attn=0.3)


def through_dict(provider: Any) -> Any:
    """As Bridge's own `asdict` does it; a deep one cannot copy process groups."""
    fields = [field.name for field in dataclasses.fields(provider) if field.init]
    return type(provider)(**{name: getattr(provider, name) for name in fields})


def through_yaml(provider: Any, folder: Path) -> Any:
    """As a checkpoint's run_config.yaml."""
    container = pytest.importorskip("megatron.training.config.container").ConfigContainerBase
    import yaml
    from megatron.training.config.instantiate_utils import instantiate, target_allowlist
    from megatron.training.config.yaml_utils import safe_yaml_representers

    provider.transformer_layer_spec = None
    path = folder / "run_config.yaml"
    with safe_yaml_representers():
        path.write_text(yaml.safe_dump({"model": container._convert_value_to_dict(provider)}))
    read = yaml.safe_load(path.read_text())
    assert read["model"]["_target_"] == f"{OURS}.DyTGPTModelProvider"
    for prefix in ALLOWED:
        target_allowlist.add_prefix(f"{prefix}.")
    return instantiate(read["model"])


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "dataclasses.replace": lambda provider, _folder: dataclasses.replace(provider),
    "fields": lambda provider, _folder: through_dict(provider),
    "deepcopy": lambda provider, _folder: copy.deepcopy(provider),
    "pickle": lambda provider, _folder: pickle.loads(pickle.dumps(provider)),
    "yaml": through_yaml,
}


@pytest.mark.parametrize("finalized", [False, True], ids=["raw", "finalized"])
@pytest.mark.parametrize("way", WAYS)
def test_settings_survive(bridge: Any, tmp_path: Path, way: str, finalized: bool) -> None:
    settings = {"dyt_preset": "unit", "dyt_function": "erf", "dyt_embedding_scale": 3.5}
    provider = bridge.DyTGPTModelProvider(**SMALL, **settings, activation_func=torch.nn.functional.silu)
    provider.finalize() if finalized else bridge.register()
    other = WAYS[way](provider, tmp_path)
    assert other is not provider
    other.finalize()
    assert other.dyt == DyTConfig.unit(32, function="erf", embedding_scale=3.5)
    assert other.init_method_std == 32**-0.5
    assert other.activation_func is torch.nn.functional.silu


def test_with_dyt_takes_the_model_of_a_recipe(bridge: Any, build: Any) -> None:
    given = bridge.GPTModelProvider(**SMALL, normalization="RMSNorm", add_bias_linear=False)
    given._hooks = ["a hook"]
    provider = bridge.with_dyt(given, dyt_preset="paper", seq_length=32)
    assert (provider.add_bias_linear, provider.seq_length, provider._hooks) == (False, 32, ["a hook"])
    assert set(alphas(build(provider)).values()) == {1.0}
    assert (given.normalization, given.seq_length) == ("RMSNorm", 16)


def test_a_provider_of_ones_own(bridge: Any) -> None:
    class Other(bridge.GPTModelProvider):
        pass

    own = dataclasses.make_dataclass("Own", [], bases=(bridge.DyTProviderMixin, Other))
    provider = own(**SMALL, normalization="DyT", dyt_preset="unit")
    provider.finalize()
    assert provider.dyt == DyTConfig.unit(32)
    with pytest.raises(UserError, match="takes a GPTModelProvider, not a Other"):
        bridge.with_dyt(Other(**SMALL))


def test_wrong_settings(bridge: Any) -> None:
    with pytest.raises(UserError, match="has no field dyt_alpha, dyt_presets"):
        bridge.with_dyt(bridge.GPTModelProvider(**SMALL), dyt_presets="unit", dyt_alpha=1.0)
    provider = bridge.DyTGPTModelProvider(**SMALL, dyt_preset="best")
    with pytest.raises(UserError, match="--dyt-preset is 'best'"):
        provider.finalize()
    baseline = bridge.DyTGPTModelProvider(**SMALL, normalization="RMSNorm", dyt_bias=True)
    with pytest.raises(UserError, match="given with --normalization RMSNorm"):
        baseline.finalize()


@pytest.mark.parametrize(
    ("size", "alpha", "std", "output_std"),
    [("7b", (0.8, 0.2), 0.02, 0.02), ("350m", (0.5, 1.0), 1 / 32, 1 / 32 / 48**0.5)],
)
def test_llama_of_a_recipe(
    bridge: Any, size: str, alpha: tuple[float, float], std: float, output_std: float
) -> None:
    provider = bridge.llama_provider(size, tensor_model_parallel_size=1)
    provider.finalize()
    assert (provider.dyt.alpha_attn, provider.dyt.alpha_ffn) == alpha
    assert (provider.init_method_std, provider.embedding_init_method_std) == (std, 0.02)
    torch.manual_seed(0)
    assert provider.output_layer_init_method(torch.empty(512, 512)).std().item() == pytest.approx(
        output_std, rel=0.02
    )


def test_a_small_llama_trains(bridge: Any, build: Any, loss_of: Any) -> None:
    size = SMALL | {"ffn_hidden_size": 64, "num_query_groups": 2, "should_pad_vocab": False}
    model = build(bridge.llama_provider("350m", **size, init_method_std=32**-0.5))
    first = loss_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < 0.7 * first.item()


def test_without_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.enable()
    forget_bridge()
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    try:
        with pytest.raises(UserError, match=r"pip install 'megatron-bridge\[te\]'"):
            importlib.import_module(OURS)
    finally:
        cpu.disable()
