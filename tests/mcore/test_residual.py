"""DyT fused with the residual stream in the model: where it is done, and that it changes nothing."""

import re
import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dyt.config import DyTConfig
from megatron_dyt.mcore import ranks, residual
from megatron_dyt.mcore.norm import DyTNorm
from megatron_dyt.mcore.norm_sites import dyt_sites
from megatron_dyt.nn import dynamic_tanh
from tests import families

Make = Callable[..., Any]
LossOf = Callable[[Any], torch.Tensor]

pytestmark = pytest.mark.needs("sum_from_norm")

Run = tuple[torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the two fused operations was called."""
    counter: Counter[str] = Counter()

    def counted(original: Make) -> Make:
        def call(*args: Any, **options: Any) -> Any:
            counter[original.__name__] += 1
            return original(*args, **options)

        return call

    for operation in (dynamic_tanh.dyt_residual, dynamic_tanh.dyt_fork):
        monkeypatch.setattr(dynamic_tanh, operation.__name__, counted(operation))
    return counter


def loss_and_gradients(model: Any, loss_of: LossOf) -> Run:
    model.train()
    torch.manual_seed(3)
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_equal(fused: Run, plain: Run, dtype: torch.dtype = torch.float32) -> None:
    """Bit for bit; but fused gradients in bf16 are added before they are rounded, and not after."""
    assert torch.equal(fused[0], plain[0])
    assert plain[1].keys() == fused[1].keys()
    tolerance = 2**-6 if dtype == torch.bfloat16 else 0
    for name, gradient in plain[1].items():
        error = (fused[1][name].double() - gradient.double()).norm()
        assert error <= tolerance * gradient.double().norm(), name


@pytest.fixture
def run(
    make_config: Make, make_spec: Make, build_gpt: Make, loss_of: LossOf, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Loss and gradients of a small GPT, with or without fusion."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    monkeypatch.setattr(MTPLossLoggingHelper, "tracker", {})  # of the number of prediction layers here

    def train(fuse: bool, dtype: torch.dtype = torch.float32, **overrides: Any) -> Run:
        config = make_config(params_dtype=dtype, bf16=dtype == torch.bfloat16, **overrides)
        config.dyt = DyTConfig.unit(32, bias=True, fuse_residual=fuse)
        options = {}
        if config.mtp_num_layers:
            prediction = get_gpt_mtp_block_spec(config, make_spec(config), use_transformer_engine=False)
            options["mtp_block_spec"] = prediction
        model = build_gpt(config, **options).to(dtype)
        return loss_and_gradients(model, loss_of)

    return train


BF16 = {"dtype": torch.bfloat16}
# Of two layers: calls with a residual added in forward, and with gradients added in backward.
VARIANTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "fp32": ({}, 2, 2),
    "bf16": (BF16, 2, 2),
    "fp32 residual": ({**BF16, "fp32_residual_connection": True}, 0, 4),
    # Once more in backward.
    "full recompute": (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        4,
        4,
    ),
    "mlp recompute": ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, 2, 2),
    "norm recompute": ({"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}, 2, 2),
    "mixture of experts": ({"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 64}, 2, 2),
    "multi-token prediction": ({"mtp_num_layers": 1}, 3, 3),
    "dropout": ({"hidden_dropout": 0.1}, 0, 4),
    "biases": ({"add_bias_linear": True}, 0, 4),
}


@pytest.mark.parametrize(("overrides", "adds", "forks"), VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_and_gradients_are_those_without_fusion(
    run: Callable[..., Run], calls: Counter[str], overrides: dict[str, Any], adds: int, forks: int
) -> None:
    plain = run(False, **overrides)
    assert not calls
    fused = run(True, **overrides)
    assert calls == Counter(dyt_residual=adds, dyt_fork=forks)
    assert_equal(fused, plain, overrides.get("dtype", torch.float32))


# T5 has two layers of two norms and two of three; the hybrid stack two of attention and two of MLP.
FAMILIES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "t5": ("t5", {"add_bias_linear": False}, 6, 4),
    "t5 with biases": ("t5", {}, 0, 10),
    "bert": ("bert", {"add_bias_linear": False}, 2, 2),
    "vit": ("vit", {"add_bias_linear": False}, 2, 2),
    "hybrid": ("hybrid", {}, 0, 4),
    "hybrid with experts": ("hybrid", {"num_moe_experts": 2, "moe_router_topk": 2}, 0, 4),
}


@pytest.mark.parametrize(("family", "overrides", "adds", "forks"), FAMILIES.values(), ids=FAMILIES.keys())
@pytest.mark.usefixtures("world")
def test_other_families_too(
    calls: Counter[str], family: str, overrides: dict[str, Any], adds: int, forks: int
) -> None:
    def train(fuse: bool) -> Run:
        config = families.config_for(family, **overrides)
        config.dyt = DyTConfig.paper(config.hidden_size, bias=True, fuse_residual=fuse)
        model = families.build(family, config)
        return loss_and_gradients(model, lambda model: families.loss_of(family, model))

    plain = train(False)
    assert not calls
    fused = train(True)
    assert calls == Counter(dyt_residual=adds, dyt_fork=forks)
    assert_equal(fused, plain)


def test_evaluation_is_fused_too(
    make_config: Make, build_gpt: Make, loss_of: LossOf, calls: Counter[str]
) -> None:
    losses = []
    for fuse in (False, True):
        config = make_config()
        config.dyt = DyTConfig.unit(32, fuse_residual=fuse)
        model = build_gpt(config).eval()
        with torch.no_grad():
            losses.append(loss_of(model))
    assert torch.equal(*losses)
    assert calls["dyt_residual"] == 2


def test_it_is_on_unless_asked_not_to(
    make_config: Make,
    build_gpt: Make,
    loss_of: LossOf,
    calls: Counter[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss_of(build_gpt(make_config()))
    assert calls == Counter(dyt_residual=2, dyt_fork=2)
    assert "fuse" not in capsys.readouterr().out


def test_probe_sees_the_sum(make_config: Make, build_gpt: Make, loss_of: LossOf) -> None:
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for fuse, inputs in seen.items():
        config = make_config()
        config.dyt = DyTConfig.unit(32, fuse_residual=fuse)
        model = build_gpt(config)
        for _, site in dyt_sites(model):
            site.probe = lambda module, x, inputs=inputs: inputs.append(x.detach().clone())
        loss_of(model)
    assert len(seen[True]) == len(seen[False]) == 5
    for fused, plain in zip(seen[True], seen[False], strict=True):
        assert torch.equal(fused, plain)


SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
GRAPHS = {"cuda_graph_impl": "local"}
# The name of the scopes until 0.17, and from 0.18.
SCOPES = ("cuda_graph_scope", "cuda_graph_modules")
OBSTACLES = [
    ("activation offloading", {"cpu_offloading": True}),
    ("activation offloading", {"fine_grained_activation_offloading": True}),
    ("--overlap-moe-expert-parallel-comm", {"overlap_moe_expert_parallel_comm": True}),
    *(("CUDA graphs of parts of a layer", {**GRAPHS, name: ["attn"]}) for name in SCOPES),
    # `transition_moe_cudagraphs` makes graphs of parts, once the model is there.
    ("CUDA graphs of parts of a layer", {**GRAPHS, "num_moe_experts": 4}),
    ("--recompute-modules layernorm with CUDA graphs", {**GRAPHS, **SELECTIVE}),
]


@pytest.fixture
def configured(make_config: Make) -> Make:
    """A config with settings put past Megatron's own checks of what goes with what."""

    def make(**settings: Any) -> Any:
        config = make_config()
        config.dyt = DyTConfig.unit(32, fuse_residual=True)
        for name, value in settings.items():
            setattr(config, name, value)
        return config

    return make


@pytest.mark.parametrize(("reason", "settings"), OBSTACLES, ids=[str(s) for _, s in OBSTACLES])
def test_what_stands_in_its_way(configured: Make, reason: str, settings: dict[str, Any]) -> None:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    assert residual.obstacles(configured(), TransformerLayer) == []
    assert residual.obstacles(configured(**settings), TransformerLayer) == [reason]


@pytest.mark.parametrize("scope", [[], ["full"], [SimpleNamespace(name="full_iteration")]], ids=str)
def test_cuda_graphs_of_whole_layers_do_not(configured: Make, scope: list[Any]) -> None:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    config = configured(**GRAPHS, cuda_graph_modules=scope, cuda_graph_scope=scope)
    assert residual.obstacles(config, TransformerLayer) == []


METHODS = ("forward", "_forward_attention", "_forward_mlp", "_forward_pre_mlp_layernorm", "_forward_post_mlp")


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_class_that_handles_norms_itself_is_left_alone(configured: Make, method: str) -> None:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    own = type("OwnLayer", (TransformerLayer,), {method: lambda self, *args: None})
    for layer in (own, type("OwnLayer", (own,), {})):
        assert residual.obstacles(configured(), layer) == ["the layer class OwnLayer"]


def test_other_subclasses_and_other_modules_are_told_apart(configured: Make) -> None:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    class Subclass(TransformerLayer):
        def helper(self) -> None:
            pass

    assert residual.obstacles(configured(), Subclass) == []
    assert residual.obstacles(configured(), torch.nn.Identity) == ["the layer class Identity"]


@pytest.mark.parametrize(
    ("since", "overrides", "line"),
    [
        (False, {"hidden_dropout": 0.1}, "do without the residual stream .* because of megatron-core before"),
        (
            True,
            {"hidden_dropout": 0.1, "add_bias_linear": True},
            "stays Megatron's kernel .* because of --hidden-dropout, biases in linear layers",
        ),
    ],
)
def test_it_says_once_why_it_is_off(
    make_config: Make,
    build_gpt: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    since: bool,
    overrides: dict[str, Any],
    line: str,
) -> None:
    monkeypatch.setattr(ranks, "_logged", set())
    monkeypatch.setattr(residual.compat, "has", lambda _feature: since)
    config = make_config(**overrides)
    config.dyt = DyTConfig.unit(32, fuse_residual=True)
    for _ in range(2):
        build_gpt(config)
    (said,) = [each for each in capsys.readouterr().out.splitlines() if "--dyt-fuse-residual" in each]
    assert re.search(line, said)
    assert said.endswith("The results are the same.")


def test_a_bias_or_dropout_is_megatrons_business(make_config: Make) -> None:
    x, bias, stream = torch.randn(2, 1, 4), torch.randn(4), torch.randn(2, 1, 4)
    add = residual.deferred_bias_dropout_add
    assert torch.equal(add(True, False)((x, bias), stream, 0.0), x + bias + stream)
    torch.manual_seed(0)
    dropped = add(True, False)((x, None), stream, 0.5)
    torch.manual_seed(0)
    assert torch.equal(dropped, stream + torch.nn.functional.dropout(x, 0.5))
    for training, probability in ((False, 0.5), (True, 0.0)):
        deferred = add(training, False)((x, None), stream, probability)
        assert isinstance(deferred, residual.DeferredSum)
        terms = deferred.take()
        assert terms[0] is x
        assert terms[1] is stream


def test_the_sum_has_the_dtype_of_the_residual_stream(make_config: Make) -> None:
    """Megatron casts what is added to it; the kernel would take the wider of the two."""
    x, stream = torch.randn(2, 1, 4), torch.randn(2, 1, 4, dtype=torch.bfloat16)
    add = residual.deferred_bias_dropout_add(True, False)
    assert torch.equal(add((x, None), stream, 0.0), x.bfloat16() + stream)


@pytest.mark.parametrize("fuse", [False, True])
def test_the_output_of_attention_is_gone_while_the_mlp_runs(
    make_config: Make, build_gpt: Make, loss_of: LossOf, fuse: bool
) -> None:
    """Nothing needs it after the add, so no frame of Megatron's layer may hold it: that is peak memory."""
    config = make_config()
    config.dyt = DyTConfig.unit(32, fuse_residual=fuse)
    model = build_gpt(config)
    outputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    for layer in model.decoder.layers:
        layer.self_attention.linear_proj.register_forward_hook(
            lambda module, args, output: outputs.append(weakref.ref(output[0]))
        )
        layer.mlp.linear_fc2.register_forward_pre_hook(
            lambda module, args: alive.append(outputs[-1]() is not None)
        )
    loss_of(model)
    assert alive == [False, False]


def test_other_code_that_gets_the_sum_is_told_what_to_do() -> None:
    total = residual.DeferredSum(torch.ones(2), torch.ones(2))
    with pytest.raises(AttributeError, match=r"'float' is asked of a residual sum .* --no-dyt-fuse-residual"):
        total.float()
    total.take()
    with pytest.raises(RuntimeError, match=r"used twice.*--no-dyt-fuse-residual"):
        total.take()


def test_megatrons_spec_is_not_changed(make_config: Make) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_dyt.mcore import spec as spec_module

    config = make_config()
    layer = get_gpt_layer_local_spec(normalization="DyT")
    parts = layer.submodules
    before = dict(vars(parts))
    fused = spec_module.rewrite_layer(config, parts, layer.module)
    assert fused.self_attn_bda is residual.deferred_bias_dropout_add
    assert fused.mlp_bda is parts.mlp_bda
    for site in ("input_layernorm", "pre_mlp_layernorm"):
        assert getattr(fused, site).params["returns_residual"]
    assert vars(parts) == before


@pytest.mark.parametrize("returns_residual", [False, True])
def test_norm_gives_output_and_residual(make_config: Make, returns_residual: bool) -> None:
    norm = DyTNorm(make_config(), 32, role="ffn", returns_residual=returns_residual)
    assert norm.returns_residual == returns_residual
    x, stream = torch.randn(3, 2, 32), torch.randn(3, 2, 32)
    y, total = norm(residual.DeferredSum(x, stream))
    assert torch.equal(total, x + stream)
    result = norm(total)
    assert isinstance(result, tuple) == returns_residual
    assert torch.equal(y, result[0] if returns_residual else result)
    if returns_residual:
        assert result[1].data_ptr() == total.data_ptr()
