"""A program in the place of a training: what it does is in its flags."""

import json
import os
import sys
import time
from pathlib import Path

PROGRAM = (sys.executable, __file__)


def main(flags: dict[str, str]) -> int:
    directory = Path(flags["--metrics-dir"])
    with (directory / "starts").open("a") as file:
        file.write(f"{os.environ['OMP_NUM_THREADS']} {flags['--data-cache-path']}\n")
    if "--save" in flags:
        assert flags["--save"] == flags["--load"]
        Path(flags["--save"]).mkdir(exist_ok=True)
    while not Path(flags.get("--wait-for", "/")).exists():
        time.sleep(0.05)
    time.sleep(float(flags.get("--seconds", "0")))
    loss = float(flags.get("--loss", "3")) + float(flags["--seed"]) / 100
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, 5):
            file.write(json.dumps(train(step, loss + (4 - step))) + "\n")
        if "--no-valid" not in flags:
            valid = {"event": "validation", "iteration": 4, "set": None, "losses": {"lm loss": finite(loss)}}
            file.write(json.dumps(valid) + "\n")
    if "--stats" in flags:
        # As the monitor does: beside the checkpoints where there are any.
        place = Path(flags.get("--save", directory)) / "dyt_stats.jsonl"
        place.write_text(json.dumps(stats(float(flags["--stats"]))) + "\n")
    print(flags.get("--say", "nothing to say"), flush=True)
    code = int(flags.get("--exit", "0"))
    if code < 0:
        os.kill(os.getpid(), -code)
    return code


def finite(loss: float) -> float | None:
    """metrics.jsonl has null for what is not finite: here, for what is large."""
    return loss if loss < 1e9 else None


def stats(alpha_std: float) -> dict[str, object]:
    site = {"name": "norm", "role": "attn", "layer": 1, "alpha": 1.0, "input_std": 1.0}
    return {"iteration": 4, "sites": [site | {"alpha_std": alpha_std, "saturated": 0.0}]}


def train(step: int, loss: float) -> dict[str, object]:
    return {
        "event": "train",
        "iteration": step,
        "steps": 1,
        "consumed_samples": 4 * step,
        "consumed_tokens": 128 * step,
        "global_batch_size": 4,
        "losses": {"lm loss": finite(loss)},
        "learning_rate": 0.01,
        "grad_norm": 1.0,
        "skipped_steps": 0,
        "nan_steps": 0,
        "seconds_per_step": 9.0 if step == 1 else step / 10,
        "tokens_per_second": 1280.0,
    }


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(main(dict(zip(words[::2], words[1::2], strict=True))))
