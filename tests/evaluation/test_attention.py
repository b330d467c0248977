"""Attention along branches against Megatron's own, and the models that do not share contexts."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.attention import SharedAttention, share_contexts, why_not_shared
from megatron_dyt.evaluation.checkpoint_model import load_model
from megatron_dyt.evaluation.lm import MegatronDyTLM

from .conftest import VOCABULARY, Trained

Train = Callable[[str], Trained]


def test_attention_with_groups_is_softmax_over_what_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 2, 4, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 5, 2, 2, 8, generator=generator, dtype=torch.float64)
    seen = torch.rand(2, 5, 5, generator=generator) < 0.5
    seen |= torch.eye(5, dtype=torch.bool)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.float64).masked_fill(~seen[:, None], float("-inf"))
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 5, 5)
    for given, visible in ((mask, seen), (None, causal)):
        got = SharedAttention(0.3)(query, key, value, given, attn_mask_type="causal")
        for batch in range(2):
            for head in range(4):
                scores = 0.3 * query[:, batch, head] @ key[:, batch, head // 2].T
                weights = scores.masked_fill(~visible[batch], float("-inf")).softmax(1)
                torch.testing.assert_close(
                    got[:, batch, 8 * head : 8 * head + 8], weights @ value[:, batch, head // 2]
                )


@pytest.mark.parametrize("norm", ["RMSNorm", "DyT"])
def test_permuted_tokens_with_their_positions_and_mask(
    trained: Train, fresh_megatron: None, norm: str
) -> None:
    """A causal sequence laid out in another order: masks and rotary positions must both follow."""
    model: Any = load_model(str(trained(norm).directory)).model
    tokens = torch.randint(0, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))
    slots = torch.arange(20).expand(2, 20)
    with torch.no_grad():
        expected = model(tokens, slots, None)
        share_contexts(model)
        share_contexts(model)
        torch.testing.assert_close(model(tokens, slots, None), expected, atol=1e-5, rtol=1e-5)
        order = torch.stack([torch.randperm(20), torch.arange(20)])
        seen = order[:, None, :] <= order[:, :, None]
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None]
        got = model(tokens.gather(1, order), order, mask)
    wanted = expected.gather(1, order[..., None].expand_as(expected))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def plain_model(**config: Any) -> Any:
    core = type("DotProductAttention", (), {})()
    layer = SimpleNamespace(self_attention=SimpleNamespace(core_attention=core))
    settings = SimpleNamespace(softmax_type="vanilla", **config)
    return SimpleNamespace(
        config=settings, position_embedding_type="rope", decoder=SimpleNamespace(layers=[layer])
    )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"multi_latent_attention": True}, "multi-latent attention"),
        ({"window_size": (128, 0)}, "sliding-window attention"),
        ({"mtp_num_layers": 1}, "multi-token prediction"),
        ({"experimental_attention_variant": "gated_delta_net"}, "experimental attention"),
    ],
)
def test_models_that_do_not_share(config: dict[str, Any], reason: str) -> None:
    assert reason in (why_not_shared(plain_model(**config)) or "")
    assert why_not_shared(plain_model()) is None


def test_parts_that_do_not_share() -> None:
    model = plain_model()
    model.config.softmax_type = "learnable"
    assert why_not_shared(model) == "the model's softmax is learnable"
    model = plain_model()
    model.position_embedding_type = "yarn"
    assert why_not_shared(model) == "the model's position embedding is yarn"
    model = plain_model()
    model.decoder.layers[0].self_attention.core_attention = torch.nn.Identity()
    assert why_not_shared(model) == "a layer's attention is Identity"


def test_modes(trained: Train, fresh_megatron: None, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(str(trained("DyT").directory))
    assert MegatronDyTLM.of(loaded, mode="flat").scorer.share is None
    loaded.model.config.window_size = (8, 0)
    assert MegatronDyTLM.of(loaded, mode="auto").scorer.share is None
    assert "contexts are not shared: the model has sliding-window attention" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be shared: the model has sliding-window"):
        MegatronDyTLM.of(loaded, mode="shared")
    with pytest.raises(UserError, match="mode 'tree' was given; allowed are auto, shared, flat"):
        MegatronDyTLM.of(loaded, mode="tree")
    loaded.model.config.window_size = None
    assert MegatronDyTLM.of(loaded).scorer.share == 32
