"""The compared methods: what they compute, how they start, and that the norms are gone."""

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from megatron_dyt.errors import UserError

pytest.importorskip("sklearn")

from examples.beyond_llm import mae, methods, vit
from examples.beyond_llm import run as frame
from examples.beyond_llm.domain import Data
from tests.shaken import shaken

MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {"vit": (vit.model, 4), "mae": (mae.model, 5)}


def made(name: str, method: str | None = None) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name][0]().double()
    if method is not None:
        methods.METHODS[method](model)
    return model.double()


def images() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double()


def test_the_command_line_has_them_all() -> None:
    assert list(frame.METHODS) == ["DyT", frame.FITTED, *methods.METHODS]


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (each.unflatten(-1, (4, 16)).transpose(1, 2) for each in (q, k, v))
    scores = q @ k.transpose(-1, -2) / 4
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


type Linear = Callable[[nn.Module, Tensor], Tensor]


def vit_by_hand(model: nn.Module, x: Tensor, apply: Linear, embed: nn.Module) -> Tensor:
    """Logits of the ViT without norms, where `apply` is what its linear layers compute."""
    embeddings = model.vit.embeddings
    weight = embed(embeddings.patch_embeddings.projection)
    tokens = nn.functional.conv2d(x, weight, embeddings.patch_embeddings.projection.bias, stride=2)
    tokens = tokens.flatten(2).transpose(1, 2)
    stream = torch.cat([embeddings.cls_token.expand(len(x), 1, -1), tokens], 1)
    stream = stream + embeddings.position_embeddings
    for layer in model.vit.layers:
        parts = (apply(getattr(layer.attention, f"{name}_proj"), stream) for name in "qkv")
        stream = stream + apply(layer.attention.o_proj, attention(*parts))
        stream = stream + apply(layer.mlp.fc2, nn.functional.gelu(apply(layer.mlp.fc1, stream)))
    return apply(model.classifier, stream[:, 0])


def scaled(layer: nn.Module, x: Tensor) -> Tensor:
    """Of a linear layer with or without SkipInit's or Fixup's scalars."""
    if not isinstance(layer, methods.Scaled):
        return linear(layer, x)
    y = linear(layer.layer, x if layer.offset is None else x + layer.offset)
    return y if layer.factor is None else layer.factor * y


def gradients(model: nn.Module, *outputs: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Of each parameter, from each of the outputs with the same gradient."""
    parameters = [p for name, p in model.named_parameters() if "mask_token" not in name]
    dy = torch.randn_like(outputs[0])
    return zip(*(torch.autograd.grad(each, parameters, dy) for each in outputs), strict=True)


@pytest.mark.parametrize("method", ["SkipInit", "Fixup"])
def test_values_and_gradients(method: str) -> None:
    model = shaken(made("vit", method))
    found = model(images()).logits
    expected = vit_by_hand(model, images(), scaled, lambda layer: layer.weight)
    torch.testing.assert_close(found, expected)
    for mine, right in gradients(model, found, expected):
        torch.testing.assert_close(mine, right)


def test_sigma_reparam_divides_by_the_largest_singular_value() -> None:
    model = shaken(made("vit", "sigmaReparam"))
    # The power iteration has to find the values of the shaken weights.
    for _ in range(400):
        model(images()[:1])
    model.eval()

    def weight(layer: nn.Module) -> Tensor:
        original, gain = layer.parametrizations.weight.original, layer.parametrizations.weight[1]
        # With its gradient, which the exact decomposition has too.
        largest = torch.linalg.svdvals(original.flatten(1))[0]
        return gain.gamma * original / largest

    def apply(layer: nn.Module, x: Tensor) -> Tensor:
        return x @ weight(layer).T + layer.bias

    found, expected = model(images()).logits, vit_by_hand(model, images(), apply, weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for mine, right in gradients(model, found, expected):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-7 + 1e-3 * float(right.abs().max()))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", methods.METHODS)
def test_the_norms_are_gone_and_it_trains(name: str, method: str) -> None:
    model = made(name, method)
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = Data(images(), torch.arange(6))
    domain = {"vit": vit.DOMAIN, "mae": mae.DOMAIN}[name]
    losses = []
    for _ in range(20):
        loss = domain.loss(model, data, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    ours = [n for n, _ in model.named_parameters() if n.split(".")[-1] in ("factor", "offset", "gamma")]
    start = made(name, method).state_dict()
    assert all(not torch.equal(model.get_parameter(each), start[each]) for each in ours)
    layers = MODELS[name][1]
    linears = 6 * layers + (1 if name == "vit" else 2)
    counts = {"SkipInit": 2 * layers, "Fixup": 8 * layers + 1, "sigmaReparam": linears + 1}
    assert len(ours) == counts[method]


@pytest.mark.parametrize("method", ["SkipInit", "Fixup"])
def test_it_starts_as_its_skip_connections(method: str) -> None:
    model = made("vit", method).eval()
    states = model.vit(images(), output_hidden_states=True).hidden_states
    assert all(torch.equal(each, states[0]) for each in states)
    assert (model(images()).logits == 0).all() == (method == "Fixup")


def test_fixup_scales_what_is_inside_of_a_branch() -> None:
    base, model = made("mae"), made("mae", "Fixup")
    weights = base.state_dict()
    # 8 branches in the encoder and 2 in the decoder, of 2 layers each.
    for stack, branches in (("vit.layers", 8), ("decoder.decoder_layers", 2)):
        for layer in ("attention.v_proj", "mlp.fc1", "attention.q_proj", "attention.k_proj"):
            name = f"{stack}.0.{layer}"
            factor = branches**-0.5 if layer in methods.INNER else 1.0
            torch.testing.assert_close(
                model.get_parameter(f"{name}.layer.weight"), factor * weights[f"{name}.weight"]
            )


def test_sigma_reparam_starts_at_norm_one() -> None:
    model = made("mae", "sigmaReparam")
    model(images())
    norms = [
        float(torch.linalg.matrix_norm(m.weight.flatten(1), 2))
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    assert len(norms) == 33
    assert min(norms) > 0.999
    assert max(norms) < 1.2  # Fifteen steps of the power iteration do not find all of it.


@pytest.mark.parametrize("method", methods.METHODS)
def test_other_layers_are_refused(method: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="Sequential has no layers like transformers' ViT"):
        methods.METHODS[method](model)
    assert model.state_dict().keys() == before.keys()


def test_an_alpha_without_dyt_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        frame.parse(["vit", "--methods", "Fixup", "--alpha0", "1", "--output", "x"])
    assert "--alpha0 is DyT's, which is not among --methods Fixup; add it" in capsys.readouterr().err
