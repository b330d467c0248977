"""Bytes that a rank of a layout needs: weights, gradients, optimizer state, activations.

bf16 training with fp32 gradients and Megatron's distributed optimizer. Activations are counted tensor by
tensor, as fused kernels keep them for the backward pass (`layer_activations`; the method of arXiv 2205.05198,
for LLaMA's layer). DyT keeps as much fused with the residual stream as apart (docs/kernels.md). These are
estimates: the allocator's slack, NCCL's buffers and the CUDA context are in `RESERVE`.
"""

from dataclasses import dataclass

from megatron_dyt.recipes import Recipe
from megatron_dyt.recipes.layout import Layout

# Bytes per element.
BF16, FP32 = 2, 4
# Bytes per parameter: Adam's fp32 weight, first and second moment, spread over the data parallel ranks.
OPTIMIZER = 3 * FP32
# Bytes per rank that no tensor of the model explains: CUDA context, NCCL's buffers, cuBLAS workspaces. A
# round figure on the safe side, not measured here.
RESERVE = 3 * 2**30
# Fraction of a GPU's memory that the caching allocator can be expected to use before it fragments. A guess.
USABLE = 0.9


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank, `stage` being its pipeline stage."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + RESERVE


def layer_parameters(recipe: Recipe, tp: int) -> int:
    """Parameters of one transformer layer on a tensor parallel rank, two DyT included."""
    hidden = recipe.hidden_size
    # With fewer query groups than ranks, ranks share one.
    keys = max(1, recipe.num_query_groups // tp) * recipe.head_dim
    qkv = hidden * (recipe.query_size // tp + 2 * keys)
    output = recipe.query_size * hidden // tp
    mlp = 3 * hidden * recipe.ffn_hidden_size // tp
    return qkv + output + mlp + 2 * norm_parameters(recipe)


def norm_parameters(recipe: Recipe) -> int:
    """Parameters of one DyT: gamma, alpha and, where the recipe has it, beta."""
    return recipe.hidden_size * (2 if recipe.bias else 1) + 1


def stage_parameters(recipe: Recipe, layout: Layout, stage: int) -> int:
    """Parameters on one rank of a pipeline stage."""
    count = recipe.num_layers // layout.pp * layer_parameters(recipe, layout.tp)
    embedding = recipe.padded_vocab_size(layout.tp) // layout.tp * recipe.hidden_size
    first, last = stage == 0, stage == layout.pp - 1
    if first:
        count += embedding + 1  # the embedding scale
    if last:
        count += norm_parameters(recipe)
        if not (recipe.tie_embeddings and first):
            count += embedding
    return count


def model_parameters(recipe: Recipe, layout: Layout, norm: str = "DyT") -> int:
    """Parameters of the whole model with DyT or RMSNorm, its vocabulary padded for the layout."""
    copies = 1 if recipe.tie_embeddings and layout.pp == 1 else 2  # The last stage has its own.
    embeddings = copies * recipe.padded_vocab_size(layout.tp) * recipe.hidden_size
    one_norm = norm_parameters(recipe) if norm == "DyT" else recipe.hidden_size
    scale = int(norm == "DyT" or recipe.preset != "paper")  # of the embedding
    matrices = recipe.parameters_without_norms - recipe.embedding_parameters
    return matrices + embeddings + (2 * recipe.num_layers + 1) * one_norm + scale


def checkpoint_bytes(recipe: Recipe) -> float:
    """Bytes of one checkpoint: bf16 weights, and Adam's three fp32 values of each."""
    whole = Layout(tp=1, pp=1, vpp=1, dp=1, micro_batch=1)
    return (BF16 + OPTIMIZER) * stage_parameters(recipe, whole, 0)


def layer_activations(recipe: Recipe, layout: Layout) -> float:
    """Bytes that a layer keeps for the backward pass of one micro-batch, on one rank.

    What autograd saves with Transformer Engine's attention and Megatron's SwiGLU fusion (both the defaults on
    GPUs), no biases, no dropout. Elements per token, where h is the width of the hidden states, q of queries,
    k of keys and of values, f of the FFN, each split over the tensor parallel ranks (sequence parallel where
    TP does not split it):

    | saved by | tensor | elements |
    |---|---|---|
    | DyT before attention | the layer's input, the residual stream | h |
    | qkv linear layer | its input, DyT's output | h |
    | attention | q and k after RoPE, v, made contiguous; q, k, v before that are gone | q + 2k |
    | attention | its output, and one fp32 per head, the softmax statistics | q |
    | output linear layer | its input: attention's output; with flash-attn and more than one sequence per \
      micro-batch a copy of it, [s, b, q] of [b, s, q] (cuDNN's attention writes [s, b, q] itself) | 0 or q |
    | DyT before the MLP | the sum of residual and attention | h |
    | gate and up linear layer | its input, DyT's output | h |
    | SwiGLU, fused | its input, gate and up | 2f |
    | down linear layer | its input, SwiGLU's output | f |

    RoPE saves its angles alone, once for all layers, and an addition saves nothing. Without the fusion
    (--no-bias-swiglu-fusion) silu(gate) and up + 0 are kept too, 2f more: that is what
    benchmarks/activation_memory.py counts. Megatron's own attention (--transformer-impl local) would add the
    probabilities, heads times the sequence's length: plans are not made for it.
    """
    tokens = layout.micro_batch * recipe.seq_length
    hidden, ffn = recipe.hidden_size, recipe.ffn_hidden_size
    if layout.recompute == "full":
        return BF16 * tokens * hidden / layout.tp
    outputs = 1 if layout.micro_batch == 1 else 2
    elements = 4 * hidden + (recipe.query_size + 2 * recipe.key_size) + outputs * recipe.query_size
    if layout.recompute == "selective":
        elements -= 2 * hidden  # Both outputs of DyT are computed again, and the MLP inside.
    else:
        elements += 3 * ffn
    softmax_statistics = FP32 * tokens * recipe.num_attention_heads
    return (BF16 * tokens * elements + softmax_statistics) / layout.tp


def chunks_in_flight(recipe: Recipe, layout: Layout, stage: int) -> int:
    """Most forward passes of a model chunk that wait for their backward pass on a stage (1F1B)."""
    micro_batches, behind = layout.micro_batches(recipe), layout.pp - stage - 1
    if layout.vpp == 1:
        return min(behind + 1, micro_batches)
    return min(2 * behind + (layout.vpp - 1) * layout.pp + 1, micro_batches * layout.vpp)


def stage_memory(recipe: Recipe, layout: Layout, stage: int) -> Memory:
    """Bytes on a rank of a pipeline stage."""
    parameters = stage_parameters(recipe, layout, stage)
    kept = layout.layers_per_chunk(recipe) * layer_activations(recipe, layout)
    activations = kept * chunks_in_flight(recipe, layout, stage)
    if layout.recompute == "full":  # One layer is held in full while it is worked on.
        activations += layer_activations(recipe, Layout(layout.tp, 1, 1, 1, layout.micro_batch))
    elif layout.recompute == "selective":
        ffn = 3 * recipe.ffn_hidden_size / layout.tp
        activations += BF16 * layout.micro_batch * recipe.seq_length * ffn
    logits = 0.0
    if stage == layout.pp - 1:
        # bf16 logits, their fp32 softmax and its gradient, the vocabulary split over the ranks.
        tokens = layout.micro_batch * recipe.seq_length
        logits = (BF16 + 2 * FP32) * tokens * recipe.padded_vocab_size(layout.tp) / layout.tp
    return Memory(
        stage=stage,
        weights=BF16 * parameters,
        gradients=FP32 * parameters,
        optimizer=OPTIMIZER * parameters / layout.dp,
        activations=activations,
        logits=logits,
    )


def fullest(recipe: Recipe, layout: Layout) -> Memory:
    """Memory of the stage that needs most: the first (activations) or the last (logits)."""
    stages = {0, layout.pp - 1}
    return max((stage_memory(recipe, layout, stage) for stage in stages), key=lambda each: each.total)
