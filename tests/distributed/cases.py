"""What the worker runs: models, layouts, and the table of cases made of them.

A case is a plain dictionary, because it travels to the worker as JSON:

    name        of the case, and of its result files
    argv        Megatron's and the plugin's flags
    like        reference case whose initial weights it starts from; None draws them
    against     reference case that it is compared with
    load        whether the flags load a checkpoint, so that no weights are set
    allowed     name of the tolerances in `compare.ALLOWED`
    unmarked    {"norm" or "embedding": [parameter names]} that lose their sequence-parallel mark
    may_fail    whether a UserError is a result, under "error"
    without     names of `worker.ABSENCES`: other special cases that the run has to do without

"{output}" in a flag becomes the directory of the results.
"""

import os
from typing import Any

# The first has the gradients, the second the update's effect, the third that of what the optimizer remembers.
STEPS = 3

# A step is two micro-batches, so that gradients are accumulated; where two data parallel ranks share it,
# ACCUMULATED leaves each of them two (of a model whose loss is a mean over samples: MoE's balancing is not).
# Everything a GPU run needs said too: local layers, no fused kernels, fp32.
COMMON = (
    "--hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 "
    "--seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 "
    "--lr 1e-3 --lr-decay-style constant --lr-decay-iters 20 --adam-eps 1e-4 --swiglu "
    "--normalization DyT --dyt-preset unit --dyt-bias --position-embedding-type rope "
    "--disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 63 --make-vocab-size-divisible-by 16 "
    "--log-interval 1000 --eval-interval 1000 --eval-iters 0 --num-workers 0 "
    "--distributed-timeout-minutes 2 --transformer-impl local --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-rope-fusion --no-persist-layer-norm"
)

UNTIED = "--untie-embeddings-and-output-weights"
GROUPED = "--group-query-attention --num-query-groups 2"
LATENT = (
    "--multi-latent-attention --kv-lora-rank 24 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8 "
    "--rope-type rope"
)
MODELS = {
    "dense": f"--num-layers 4 {GROUPED} {UNTIED}",
    "bf16": f"--num-layers 4 {GROUPED} {UNTIED} --bf16 --micro-batch-size 1",
    "auto": f"--num-layers 2 {GROUPED} {UNTIED} --qk-layernorm --dyt-preset auto",
    "running": f"--num-layers 2 {GROUPED} {UNTIED} --qk-layernorm --dyt-preset auto --dyt-running-scale all",
    "frozen": f"--num-layers 2 {GROUPED} {UNTIED} --dyt-freeze-alpha",
    "tied": f"--num-layers 2 {GROUPED} --global-batch-size 8",
    "one_kv_head": f"--num-layers 2 --group-query-attention --num-query-groups 1 {UNTIED}",
    "qk": f"--num-layers 2 {GROUPED} {UNTIED} --qk-layernorm",
    "moe": f"--num-layers 2 {GROUPED} {UNTIED} --global-batch-size 8 --num-experts 4 --moe-router-topk 2 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 "
    "--moe-token-dispatcher-type alltoall --moe-shared-expert-intermediate-size 32",
    "latent": f"--num-layers 2 {UNTIED} {LATENT} --q-lora-rank 16 --qk-layernorm",
    "latent_without_norms": f"--num-layers 2 {UNTIED} {LATENT} --q-lora-rank 16",
    "latent_without_q": f"--num-layers 2 {UNTIED} {LATENT}",
    "mtp": f"--num-layers 4 {GROUPED} {UNTIED} --mtp-num-layers 2",
    "mtp_tied": f"--num-layers 4 {GROUPED} --mtp-num-layers 1 --global-batch-size 8",
}

SP = "--sequence-parallel"
TP2, TP2_SP = "--tensor-model-parallel-size 2", f"--tensor-model-parallel-size 2 {SP}"
PP2 = "--pipeline-model-parallel-size 2"
PP4 = "--pipeline-model-parallel-size 4"
VPP2 = f"{PP2} --num-virtual-stages-per-pipeline-rank 2"
CP2 = "--context-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
ALLGATHER = "--moe-token-dispatcher-type allgather"
ACCUMULATED = "--micro-batch-size 1"
DIST_OPT = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 4000"
FSDP = (
    "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params --use-distributed-optimizer "
    "--ckpt-format fsdp_dtensor"
)
# The first stage's layers of "mtp" fill a bucket exactly: what comes next, the embedding scale, would begin
# another one there, and end one on the second stage.
UNEVEN_BUCKETS = "--ddp-bucket-size 19120"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn layernorm mlp"
# Fusion with the residual stream is on in all other cases.
UNFUSED = "--no-dyt-fuse-residual"
SELECTIVE_MOE = "--recompute-granularity selective --recompute-modules core_attn layernorm moe"


def case(model: str, name: str = "", flags: str = "", steps: int = STEPS, **options: Any) -> dict[str, Any]:
    """The case `model-name`: a model of MODELS under more flags; without a name it is the reference."""
    argv = f"{COMMON} {MODELS[model]} --train-iters {steps} {flags}".split()
    return {
        "name": f"{model}-{name}" if name else model,
        "argv": argv,
        "like": model if name else None,
        "against": model,
        "load": False,
        "allowed": "fp32_running" if model in ("auto", "running") else "fp32",
        "unmarked": {},
        "may_fail": False,
        "without": [],
    } | options


def named(cases: list[dict[str, Any]]) -> list[str]:
    return [each["name"] for each in cases]


# `make test-versions` sets MEGATRON_DYT_CORE_CASES: these layouts then stand for all, on each release.
CORE_ONLY = bool(os.environ.get("MEGATRON_DYT_CORE_CASES"))
CORE = (
    *("dense-unfused", "dense-selective_recompute"),
    *("dense-tp2", "dense-tp2_sp", "dense-pp2", "dense-pp2_virtual", "dense-dp2_distributed_optimizer"),
    "qk-tp2_sp",
    *("moe-ep2", "moe-tp2_sp", "latent-tp2", "latent-tp2_sp", "mtp-tp2_sp", "mtp-pp2"),
)


def chosen(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases to run: all, or those of the core."""
    return [each for each in cases if each["name"] in CORE] if CORE_ONLY else cases


def _referred_to(model: str) -> bool:
    return not CORE_ONLY or any(name.startswith(f"{model}-") for name in CORE)


REFERENCES = [case(model) for model in MODELS if _referred_to(model)]

LATENTS = [model for model in MODELS if model.startswith("latent")]

ONE_PROCESS = chosen(
    [
        case("dense", "one_microbatch", "--micro-batch-size 4"),
        case("dense", "four_microbatches", "--micro-batch-size 1"),
        case("dense", "full_recompute", FULL),
        case("dense", "selective_recompute", SELECTIVE),
        case("dense", "unfused", UNFUSED),
        case("running", "one_microbatch", "--micro-batch-size 4"),
        case("running", "full_recompute", FULL),
        case("running", "selective_recompute", SELECTIVE),
        case("moe", "full_recompute", FULL),
        case("moe", "selective_recompute", SELECTIVE_MOE),
        case("latent", "full_recompute", FULL),
        case("mtp", "full_recompute", FULL),
    ]
)

TWO_PROCESSES = chosen(
    [
        case("dense", "tp2", TP2),
        case("dense", "tp2_sp", TP2_SP),
        case("dense", "tp2_sp_full_recompute", f"{TP2_SP} {FULL}"),
        case("dense", "tp2_sp_selective_recompute", f"{TP2_SP} {SELECTIVE}"),
        case("dense", "pp2", PP2),
        case("dense", "pp2_virtual", VPP2),
        case("dense", "dp2", ACCUMULATED),
        case("dense", "dp2_distributed_optimizer", f"{DIST_OPT} {ACCUMULATED}"),
        case("dense", "dp2_fsdp", f"{FSDP} {ACCUMULATED}"),
        case("moe", "dp2_fsdp", FSDP),
        case("mtp", "dp2_fsdp", f"{FSDP} {ACCUMULATED}"),
        case("dense", "cp2", CP2),
        case("dense", "pp2_uneven", f"{PP2} --decoder-first-pipeline-num-layers 1"),
        case("bf16", "dp2_distributed_optimizer", DIST_OPT, allowed="bf16_data_parallel"),
        case("dense", "tp2_sp_unfused", f"{TP2_SP} {UNFUSED}"),
        case("auto", "tp2", TP2),
        case("running", "tp2", TP2),
        case("running", "tp2_sp", TP2_SP),
        case("running", "pp2", PP2),
        case("running", "cp2", CP2),
        case("running", "dp2_distributed_optimizer", f"{DIST_OPT} {ACCUMULATED}"),
        case("running", "dp2_fsdp", f"{FSDP} {ACCUMULATED}"),
        case("frozen", "dp2_distributed_optimizer", f"{DIST_OPT} {ACCUMULATED}"),
        case("frozen", "tp2_sp", TP2_SP),
        case("frozen", "dp2_fsdp", f"{FSDP} {ACCUMULATED}"),
        case("tied", "tp2_sp", TP2_SP),
        case("tied", "pp2", PP2),
        case("one_kv_head", "tp2", TP2),
        case("one_kv_head", "tp2_sp", TP2_SP),
        case("qk", "tp2", TP2),
        case("qk", "tp2_sp", TP2_SP),
        case("moe", "ep2", EP2),
        case("moe", "ep2_distributed_optimizer", f"{EP2} {DIST_OPT}"),
        case("moe", "tp2_sp", TP2_SP),
        case("moe", "tp2_sp_ep2", f"{TP2_SP} {EP2} --expert-tensor-parallel-size 1"),
        case("moe", "tp2_sp_ep2_allgather", f"{TP2_SP} {EP2} --expert-tensor-parallel-size 1 {ALLGATHER}"),
        *(case(model, "tp2", TP2) for model in LATENTS),
        *(case(model, "tp2_sp", TP2_SP) for model in LATENTS),
        case("latent", "pp2", PP2),
        case("latent", "dp2_distributed_optimizer", f"{DIST_OPT} {ACCUMULATED}"),
        case("mtp", "tp2", TP2),
        case("mtp", "tp2_sp", TP2_SP),
        case("mtp", "cp2", CP2, without=["mean_per_rank"]),
        case("mtp", "pp2", f"{PP2} --save {{output}}/checkpoints/mtp_pp2 --save-interval 1000"),
        case("mtp", "pp2_virtual", VPP2),
        case("mtp", "dp2_distributed_optimizer", f"{DIST_OPT} {ACCUMULATED}"),
    ]
)

FOUR_PROCESSES = [
    case("dense", "tp4_sp", f"--tensor-model-parallel-size 4 {SP}"),
    case("dense", "tp2_sp_cp2", f"{TP2_SP} {CP2}"),
    case("dense", "tp2_sp_pp2_virtual", f"{TP2_SP} {VPP2}"),
    case("dense", "tp2_sp_dp2_distributed_optimizer", f"{TP2_SP} {DIST_OPT} {ACCUMULATED}"),
    case("bf16", "tp2_sp_dp2_distributed_optimizer", f"{TP2_SP} {DIST_OPT}", allowed="bf16"),
    case("dense", "tp2_sp_dp2_fsdp", f"{TP2_SP} {FSDP} {ACCUMULATED}"),
    case("auto", "tp2_sp_dp2_distributed_optimizer", f"{TP2_SP} {DIST_OPT} {ACCUMULATED}"),
    case("auto", "tp2_sp_pp2_full_recompute", f"{TP2_SP} {PP2} {FULL}"),
    case("running", "tp2_sp_pp2", f"{TP2_SP} {PP2}"),
    case("running", "tp2_sp_dp2", f"{TP2_SP} {ACCUMULATED}"),
    case("tied", "tp2_sp_pp2", f"{TP2_SP} {PP2}"),
    case("moe", "tp2_sp_pp2_ep2", f"{TP2_SP} {PP2} {EP2} --expert-tensor-parallel-size 1"),
    # Experts split over tensor parallel ranks: of unequal numbers of tokens.
    case("moe", "tp2_sp_ep2_expert_tp2", f"{TP2_SP} {EP2} --expert-tensor-parallel-size 2"),
    case("latent", "tp2_pp2", f"{TP2} {PP2}"),
    case("mtp", "tp2_sp_pp2", f"{TP2_SP} {PP2}"),
    case("mtp", "pp2_dp2_distributed_optimizer", f"{PP2} {DIST_OPT} {UNEVEN_BUCKETS} {ACCUMULATED}"),
    # Three stages have the word embedding, two of them the scale.
    case("mtp_tied", "pp4_apart", f"{PP4} --pipeline-model-parallel-layout Et|tt|tm|L"),
]


# --- mutations: one special case taken away each, which the comparison must notice --------------------

UNMARKED = {
    "norms": ("dense", {"norm": ["alpha", "weight", "bias"]}),
    "embedding_scale": ("dense", {"embedding": ["scale"]}),
    "moe_norms": ("moe", {"norm": ["alpha", "weight", "bias"]}),
    "latent_norms": ("latent", {"norm": ["alpha", "weight", "bias"]}),
    "mtp_norms": ("mtp", {"norm": ["alpha", "weight", "bias"]}),
}
MUTANTS = [
    *(
        case(model, f"without_mark_on_{name}", TP2_SP, steps=1, unmarked=unmarked)
        for name, (model, unmarked) in UNMARKED.items()
    ),
    case("latent", "without_averaging", TP2, steps=1, without=["averaging"]),
    case("mtp", "without_sum_of_copies", PP2, steps=1, without=["sum_of_copies"]),
]
FOUR_PROCESS_MUTANTS = [
    case("mtp", "without_bucket", f"{PP2} {DIST_OPT} {UNEVEN_BUCKETS}", steps=1, without=["bucket"]),
]
