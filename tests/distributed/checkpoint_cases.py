"""Checkpoints saved after SAVED_AT steps in one layout, and continued in another one to the end."""

from pathlib import Path
from typing import Any, NamedTuple

from tests.distributed.cases import DIST_OPT, EP2, PP2, TP2_SP, VPP2, case

# Two steps are left: the loss of the second one follows an update by the optimizer that was loaded.
SAVED_AT = 1

ASYNC = "--async-save --use-persistent-ckpt-worker"
# Megatron saves fully in parallel unless told not to.
NOT_PARALLEL = "--no-ckpt-fully-parallel-save"
PARALLEL_LOAD = "--ckpt-fully-parallel-load"
RESHARDABLE = f"{DIST_OPT} --dist-ckpt-optim-fully-reshardable"

TP2_SP_EP2 = f"{TP2_SP} {EP2} --expert-tensor-parallel-size 1"

# Model and flags of two processes that save.
SAVERS = {
    "tp2_sp": ("dense", f"{TP2_SP} {NOT_PARALLEL}"),
    "running_tp2_sp": ("running", TP2_SP),
    "pp2": ("dense", f"{PP2} {ASYNC}"),
    "pp2_virtual": ("dense", VPP2),
    "dp2_distributed": ("dense", f"{DIST_OPT} {ASYNC}"),
    "dp2_reshardable": ("dense", RESHARDABLE),
    "ep2": ("moe", EP2),
    "ep2_reshardable": ("moe", f"{EP2} {RESHARDABLE} {ASYNC}"),
}


class Load(NamedTuple):
    """What `saver` has saved, continued under `flags`; `name` says how."""

    saver: str
    name: str
    flags: str = ""
    with_optimizer: bool = True

    @property
    def model(self) -> str:
        return (SAVERS | MATRIX_SAVERS)[self.saver][0]


BY_ONE = [
    Load("tp2_sp", "one"),
    Load("running_tp2_sp", "one"),
    Load("pp2", "one"),
    Load("pp2_virtual", "one"),
    # Megatron's default format keeps the optimizer in the buckets of gradients, whose size must be the same.
    Load("dp2_distributed", "one", DIST_OPT),
    Load("dp2_reshardable", "one", f"{RESHARDABLE} {PARALLEL_LOAD}"),
    # With experts on one rank Megatron has one optimizer, otherwise two: their states do not fit.
    Load("ep2", "one", "--no-load-optim", with_optimizer=False),
]

BY_TWO = [
    Load("tp2_sp", "pp2", PP2),
    Load("running_tp2_sp", "pp2", PP2),
    Load("pp2", "pp2_virtual", VPP2),
    Load("pp2_virtual", "tp2_sp", f"{TP2_SP} {PARALLEL_LOAD}"),
    Load("tp2_sp", "dp2", PARALLEL_LOAD),
    Load("dp2_distributed", "dp2_distributed", f"{DIST_OPT} {PARALLEL_LOAD}"),
    Load("dp2_reshardable", "tp2_sp_distributed", f"{TP2_SP} {DIST_OPT}"),
    Load("dp2_reshardable", "pp2_virtual_distributed", f"{VPP2} {DIST_OPT}"),
    Load("ep2", "tp2_sp_ep2", f"{TP2_SP_EP2} {PARALLEL_LOAD}"),
    Load("ep2_reshardable", "tp2_sp_ep2_distributed", f"{TP2_SP_EP2} {DIST_OPT}"),
]


# What Megatron has no way to load, and that is said before a model is built.
REFUSED = {
    Load(
        "dp2_distributed", "pp2_distributed", f"{PP2} {DIST_OPT}"
    ): "--pipeline-model-parallel-size 2 (saved: 1)",
    Load(
        "dp2_distributed", "larger_buckets", f"{DIST_OPT} --ddp-bucket-size 9000"
    ): "--ddp-bucket-size 9000 (saved",
    Load("ep2_reshardable", "dp2_distributed", DIST_OPT): "saved with --expert-model-parallel-size 2, and",
}


# --- every layout to every other, with `make test-layouts` --------------------------------------------

LAYOUTS = {"dp2": "", "tp2_sp": TP2_SP, "pp2": PP2, "ep2": EP2}
MATRIX = [
    Load(f"from_{saver}{kind}", loader, f"{flags} {DIST_OPT}")
    for kind in ("_default", "_reshardable")
    for saver in LAYOUTS
    for loader, flags in LAYOUTS.items()
]
MATRIX_SAVERS = {
    f"from_{name}{kind}": ("moe", f"{flags} {optimizer}")
    for kind, optimizer in (("_default", DIST_OPT), ("_reshardable", RESHARDABLE))
    for name, flags in LAYOUTS.items()
}


def resumes(load: Load) -> bool:
    """Whether docs/checkpoints.md says so."""
    saver, _, kind = load.saver.removeprefix("from_").rpartition("_")
    same_optimizers = (saver == "ep2") == (load.name == "ep2")
    return same_optimizers and (kind == "reshardable" or saver == load.name)


def saving(saver: str, directory: Path) -> dict[str, Any]:
    """The case that saves."""
    model, flags = (SAVERS | MATRIX_SAVERS)[saver]
    saves = f"--save {directory / saver} --save-interval 1000"
    return case(model, f"{saver}_saving", f"{flags} {saves}", steps=SAVED_AT)


def loading(load: Load, directory: Path, may_fail: bool = False) -> dict[str, Any]:
    """The case that loads what `saving` has saved, and goes on."""
    flags = f"{load.flags} --load {directory / load.saver} --override-opt_param-scheduler"
    return case(load.model, f"{load.saver}_loaded_by_{load.name}", flags, load=True, may_fail=may_fail)
