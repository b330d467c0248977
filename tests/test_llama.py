"""A LLaMA's shape in Megatron's words and in Hugging Face's: what is mapped, and what is refused."""

from argparse import Namespace
from dataclasses import replace
from typing import Any

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.llama import LLAMA3_ROPE, LlamaShape, query_groups

PLAIN = LlamaShape(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=4,
    vocab_size=256,
    seq_length=16,
)
VARIANTS = {
    "plain": PLAIN,
    "grouped queries, tied": replace(PLAIN, num_query_groups=2, tie_embeddings=True),
    "wide heads, q, k and v biased": replace(PLAIN, kv_channels=16, qkv_bias=True),
    "biases, epsilon": replace(PLAIN, qkv_bias=True, linear_bias=True, norm_epsilon=1e-6),
    "linear rope": replace(PLAIN, rope_type="linear", rope_factor=2.0, rope_base=5e5),
    "llama3 rope": replace(PLAIN, rope_type="llama3", rope_factor=32.0),
    "norms on queries and keys": replace(PLAIN, qk_layernorm=True),
}


def saved(shape: LlamaShape, **changes: Any) -> Namespace:
    return Namespace(**({"normalization": "DyT"} | shape.megatron_args() | changes))


def hf(shape: LlamaShape, **changes: Any) -> dict[str, Any]:
    return {"model_type": "llama"} | shape.hf_config() | changes


def same(one: LlamaShape, other: LlamaShape) -> bool:
    return replace(one, kv_channels=one.head_dim) == replace(other, kv_channels=other.head_dim)


@pytest.mark.parametrize("variant", VARIANTS)
def test_megatron_s_saved_args_give_the_shape_back(variant: str) -> None:
    assert same(LlamaShape.from_megatron(saved(VARIANTS[variant])), VARIANTS[variant])


@pytest.mark.parametrize("variant", VARIANTS)
def test_hugging_face_s_config_gives_the_shape_back(variant: str) -> None:
    shape = VARIANTS[variant]
    more = {"qk_layernorm": True} if shape.qk_layernorm else {}
    assert same(LlamaShape.from_hf(hf(shape, **more), "--load DIR"), shape)


@pytest.mark.parametrize("variant", VARIANTS)
def test_megatron_s_parser_reads_the_flags_as_the_args(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every argument that the shape stores, but those that are made after parsing."""
    from megatron.training import arguments

    shape = VARIANTS[variant]
    monkeypatch.setattr("sys.argv", ["train", *shape.megatron_flags()])
    parsed = vars(arguments.parse_args())
    expected = shape.megatron_args()
    made_later = {"padded_vocab_size", "kv_channels"}
    if shape.num_query_groups == shape.num_attention_heads:
        made_later.add("num_query_groups")
    names = (expected.keys() & parsed.keys()) - made_later
    assert {name: parsed[name] for name in names} == {name: expected[name] for name in names}
    assert len(expected.keys() - parsed.keys()) <= 1  # one of the two names of the norm's epsilon
    assert parsed["kv_channels"] == shape.kv_channels


def test_the_keys_of_hugging_face_s_config() -> None:
    shape = replace(VARIANTS["llama3 rope"], num_query_groups=2)
    assert shape.hf_config() == {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 256,
        "max_position_embeddings": 16,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 32.0} | LLAMA3_ROPE,
    }


def test_what_a_config_leaves_out_is_as_in_transformers() -> None:
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    config = {key: hf(PLAIN)[key] for key in (*needed, "model_type", "max_position_embeddings")}
    shape = LlamaShape.from_hf(config | {"head_dim": None, "rope_theta": 500.0}, "--load DIR")
    assert same(shape, replace(PLAIN, norm_epsilon=1e-6, rope_base=500.0))


def test_the_older_name_of_a_scaled_rotary_embedding() -> None:
    config = hf(PLAIN, rope_parameters=None, rope_theta=500.0, rope_scaling={"type": "linear", "factor": 4})
    shape = LlamaShape.from_hf(config, "--load DIR")
    assert (shape.rope_type, shape.rope_factor, shape.rope_base) == ("linear", 4.0, 500.0)


def test_the_vocabulary_is_padded_as_by_megatron() -> None:
    shape = replace(PLAIN, vocab_size=129)
    assert (shape.padded_vocab_size(), shape.padded_vocab_size(4)) == (256, 512)
    assert shape.megatron_args()["padded_vocab_size"] == 256


def test_parameters_by_hand() -> None:
    grouped = replace(PLAIN, num_query_groups=2)
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32  # q; k and v of two heads of width 8; output
    assert grouped.parameters_without_norms == 2 * (attention + 3 * 32 * 64) + 2 * 256 * 32
    tied = replace(grouped, tie_embeddings=True)
    assert grouped.parameters_without_norms - tied.parameters_without_norms == 256 * 32


def test_query_groups_count_with_the_switch_only() -> None:
    args = Namespace(num_attention_heads=4, num_query_groups=1, group_query_attention=False)
    assert query_groups(args) == 4
    args.group_query_attention = True
    assert query_groups(args) == 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"num_experts": 8}, "mixture of experts"),
        ({"multi_latent_attention": True}, "--multi-latent-attention"),
        ({"mtp_num_layers": 1}, "multi-token prediction"),
        ({"hybrid_layer_pattern": "M*"}, "hybrid"),
        ({"experimental_attention_variant": "dsa"}, "hybrid"),
        ({"heterogeneous_layers_config_path": "layers.json"}, "heterogeneous layers"),
        ({"spec": ["my.spec", "layers"]}, "--spec"),
        ({"swiglu": False}, "without --swiglu"),
        ({"glu_linear_offset": 1.0}, "--glu-linear-offset"),
        ({"activation_func_clamp_value": 7.0}, "--activation-func-clamp-value"),
        ({"position_embedding_type": "learned_absolute"}, "other than rope"),
        ({"rotary_percent": 0.5}, "--rotary-percent"),
        ({"rotary_interleaved": True}, "--rotary-interleaved"),
        ({"no_rope_freq": [1, 0]}, "--no-rope-freq"),
        ({"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}, "--use-rope-scaling together"),
        ({"window_size": (128, 0)}, "--window-size"),
        ({"softmax_type": "learnable"}, "--softmax-type"),
        ({"softmax_scale": 0.5}, "--softmax-scale"),
        ({"attention_output_gate": True}, "--attention-output-gate"),
        ({"qk_l2_norm": True}, "--qk-l2-norm"),
        ({"layernorm_zero_centered_gamma": True}, "--apply-layernorm-1p"),
        ({"apply_residual_connection_post_layernorm": True}, "post-layernorm"),
        ({"use_mup": True}, "--use-mup"),
        ({"qk_layernorm": True, "normalization": "RMSNorm"}, "--qk-layernorm with RMSNorm"),
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm"),
        ({"num_attention_heads": 5}, "no multiple of the attention heads"),
    ],
)
def test_a_run_that_is_no_llama_is_refused(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match="no Hugging Face LLaMA form") as error:
        LlamaShape.from_megatron(saved(PLAIN, **changed))
    assert named in str(error.value)
    assert ";" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model_type": "mixtral"}, r"model_type 'mixtral' \(llama and llama_dyt are known\)"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' \(not silu\)"),
        ({"quantization_config": {"bits": 4}}, "a quantization"),
        ({"dyt_folded": ["attn"]}, "export again without --fold-weight"),
        ({"lm_head_bias": True}, "a bias of the output layer"),
        ({"mlp_bias": True}, "biases in the MLP where attention has none"),
        ({"intermediate_size": None}, "no intermediate_size"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary embedding .*yarn"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1.5}}, "linear with a whole factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3 with .*8192"),
        ({"rope_parameters": {"rope_theta": 1.5}}, "all with a whole rope_theta"),
    ],
)
def test_a_config_that_megatron_has_no_llama_for_is_refused(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"^--load DIR: .*{named}"):
        LlamaShape.from_hf(hf(PLAIN, **changed), "--load DIR")


def test_several_reasons_are_all_named() -> None:
    with pytest.raises(UserError, match=r"--num-experts.*; --use-mup"):
        LlamaShape.from_megatron(saved(PLAIN, num_experts=8, use_mup=True))
    with pytest.raises(UserError, match=r"hidden_act 'gelu'.*; a quantization; no vocab_size"):
        LlamaShape.from_hf(hf(PLAIN, hidden_act="gelu", quantization_config={"bits": 4}, vocab_size=0), "x")
