"""The stages of gpu_hour.sh, which says what it is for.

Each stage is a process of its own, and its result is OUT/STAGE.json as soon as it has ended: whether it is
done, failed, was cut off by its time limit or left out, why, what the benchmark measured, and the end of what
it printed. What is done is not run again. Nothing here imports torch: what is wrong with a machine is found
out by a process that may die of it.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_dyt.atomic import read_json, write_json  # noqa: E402

STAGE_SECONDS = 8 * 60.0
# Less is not worth the start of a process.
LEAST_SECONDS = 60.0
# torch and CUDA start in 10 to 20 s; a driver in trouble hangs for ever.
PROBE_SECONDS = 120.0
# In the folder of unpacked wheels: Python runs it as it starts, and it reads their .pth files.
SITE = "import pathlib, site\n\nsite.addsitedir(str(pathlib.Path(__file__).parent))\n"
# The kernels are compiled for sm_80 and later; no earlier chip has bf16.
OLDEST = (8, 0)
# What a stage leaves under this name is the launch table of those after it.
TABLE = "launch_table.json"
GB = 1e9


class Stage(NamedTuple):
    """A part of the hour.

    command: what the interpreter runs, {dir} being the stage's own directory and {seconds} what it may take.
    rehearsal: the same, on a CPU. needs: modules that must be there. wants: those that it can do without.
    gigabytes: GPU memory that must be free.
    """

    name: str
    what: str
    command: str
    rehearsal: str
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()
    gigabytes: float = 8


MEGATRON = ("megatron.core", "matplotlib")
PYTEST = "-m pytest -q -p no:cacheprovider -W ignore"
# cutlass alone is there without the wheel of its cutlass_dsl, which quack needs.
PEERS = ("liger_kernel", "quack", "cutlass.cutlass_dsl")


def kernels(hidden: int) -> Stage:
    return Stage(
        f"kernels-{hidden}",
        f"kernels at hidden {hidden} beside eager, torch.compile, Liger, quack, and the copy rate",
        f"benchmarks/kernels.py --hidden {hidden} --tokens 1024 8192 16384 65536 --output {{dir}}",
        "benchmarks/kernels.py --rehearse --hidden 64 --tokens 8 --rounds 2 --output {dir}",
        ("matplotlib",),
        PEERS,
        40,
    )


TUNE = Stage(
    "tune",
    "the launch table of this chip, by timing",
    "benchmarks/tune.py --output {dir}",
    "benchmarks/tune.py --rehearse --rounds 2 --output {dir}",
)
STAGES = (
    Stage(
        "correctness",
        "kernels and Megatron's layers against fp64: dtypes, CUDA graphs, torch.compile, recompute, fusion",
        f"{PYTEST} -m gpu tests/ops tests/benchmarks",
        f"{PYTEST} tests/ops/test_triton_dyt.py -k test_the_sum_is_rounded",
        ("pytest", "xdist", "pytest_timeout", "megatron.core"),
        gigabytes=20,
    ),
    kernels(4096),
    Stage(
        "layers",
        "LLaMA-7B-shaped layers by norm: step time and peak memory",
        "benchmarks/model.py --output {dir}",
        "benchmarks/model.py --layers 1 --rounds 2 --output {dir}",
        MEGATRON,
        ("transformer_engine",),
        40,
    ),
    kernels(8192),
    Stage(
        "paper",
        "the paper's efficiency tables, not compiled",
        "benchmarks/hf_model.py --no-compile --rounds 40 --output {dir}",
        "benchmarks/hf_model.py --layers 1 --tokens 16 --rounds 2 --output {dir}",
        ("transformers", "matplotlib"),
        gigabytes=70,
    ),
    kernels(5120),
    Stage(
        "paper-compiled",
        "the paper's efficiency tables, compiled",
        "benchmarks/hf_model.py --only-compiled --rounds 40 --output {dir}",
        "benchmarks/hf_model.py --layers 1 --tokens 16 --rounds 2 --output {dir}",
        ("transformers", "matplotlib"),
        gigabytes=70,
    ),
    kernels(2048),
    kernels(16384),
    Stage(
        "train",
        "LLaMA 125M with both norms, as many steps as the time allows",
        "benchmarks/train.py --seconds {seconds} --output {dir}",
        "benchmarks/train.py --seconds {seconds} --rehearse --output {dir}",
        (*MEGATRON, "sentencepiece", "pyarrow"),
        gigabytes=40,
    ),
)

# Runs before all stages, in a process of its own; prints what it finds.
PROBE = """
import importlib.util, json, sys, warnings
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:
        return False
found = {"missing": [name for name in sys.argv[1:] if not there(name)], "torch": None, "gpu": None, "why": ""}
if "torch" not in found["missing"]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch
        found["torch"] = torch.__version__
        try:
            torch.cuda.init()
            name, (free, total) = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
            capability = torch.cuda.get_device_capability()
            found["gpu"] = {"name": name, "capability": capability, "free": free, "total": total}
        except Exception as error:
            found["why"] = " ".join([str(error).split(chr(10))[0], *(str(w.message) for w in caught)])
print(json.dumps(found))
"""
REHEARSAL_GPU = {"name": "a CPU in a GPU's place", "capability": OLDEST, "free": 1e12, "total": 1e12}


def unpack(wheels: Path, site: Path) -> list[str]:
    """Unpack the wheels under `wheels` that are not installed into `site`; returns what is wrong with them.

    A large wheel can lie in pieces, NAME.1of2 and NAME.2of2; with a piece missing it is left for another
    call.
    """
    faults = []
    found = {path.name: [path] for path in sorted(wheels.rglob("*.whl"))}
    for path in sorted(wheels.rglob("*.whl.*of*")):
        found.setdefault(path.name.rpartition(".")[0], []).append(path)
    for name, pieces in found.items():
        distribution, version = name.split("-")[:2]
        if (site / f"{distribution}-{version}.dist-info" / "RECORD").is_file() or _installed(distribution):
            continue
        wanted = 1 if pieces[0].suffix == ".whl" else int(pieces[0].name.rpartition("of")[2])
        if len(pieces) < wanted:
            faults.append(f"{name}: piece {len(pieces)} of {wanted} is the last here; bring the others")
            continue
        site.mkdir(parents=True, exist_ok=True)
        (site / "sitecustomize.py").write_text(SITE)
        whole = site / name
        whole.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        try:
            with zipfile.ZipFile(whole) as archive:
                for info in archive.infolist():
                    # What an installer would move beside the others.
                    info.filename = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", info.filename)
                    if info.filename:
                        archive.extract(info, site)
        except zipfile.BadZipFile as error:
            faults.append(f"{name} is damaged ({error}); collect it again: make gpu-wheels")
        whole.unlink()
    return faults


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def probe(modules: Iterable[str], environment: dict[str, str]) -> dict[str, Any]:
    """What of `modules` is missing, torch's version and the GPU, or why there is none."""
    command = [sys.executable, "-c", PROBE, "torch", "triton", *modules]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        why = f"it did not answer within {PROBE_SECONDS:g} s"
        return {"missing": [], "torch": None, "gpu": None, "why": why}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"missing": [], "torch": None, "gpu": None, "why": _last(done.stderr)}
    return found


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def refusal(found: dict[str, Any]) -> str:
    """Why nothing can run on this machine, in one line; empty where something can."""
    for package in ("torch", "triton"):
        if package in found["missing"]:
            return (
                f"{package} is not installed for {sys.executable}; the hour takes torch 2.11 and triton 3.6"
            )
    gpu = found["gpu"]
    if gpu is None:
        return f"torch {found['torch']} finds no GPU that it can use: {found['why']}"
    if tuple(gpu["capability"]) < OLDEST:
        major, minor = gpu["capability"]
        return f"{gpu['name']} is sm_{major}{minor}; the kernels need sm_80 (A100) or later"
    return ""


def obstacle(stage: Stage, found: dict[str, Any]) -> str:
    """Why this stage cannot run on a machine where others can, in one line."""
    missing = [name for name in stage.needs if name in found["missing"]]
    if missing:
        return f"{', '.join(missing)} is neither installed nor among the wheels; bring it: make gpu-wheels"
    gpu = found["gpu"]
    if gpu["free"] < stage.gigabytes * GB:
        return (
            f"{gpu['name']} has {gpu['free'] / GB:.0f} GB of {gpu['total'] / GB:.0f} free; "
            f"{stage.gigabytes:.0f} are needed"
        )
    return ""


def run(
    stage: Stage, seconds: float, output: Path, environment: dict[str, str], rehearse: bool
) -> tuple[dict[str, Any], BaseException | None]:
    """Run the stage for at most `seconds`; returns its result, and what was to end this process meanwhile."""
    directory = output / "work" / stage.name
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob("*.json"):
        path.unlink()
    template = stage.rehearsal if rehearse else stage.command
    command = [word.format(dir=directory, seconds=int(seconds - 10)) for word in template.split()]
    log = directory / "log"
    began = time.monotonic()
    stopped: BaseException | None = None
    with log.open("w") as file:
        # A group of its own, to end with all that it has started, in this session, whose end is its end too.
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            process_group=0,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        except (KeyboardInterrupt, SystemExit) as stop:
            code, stopped = None, stop
        finally:
            _end(process)
    lines = log.read_text(errors="replace").splitlines()
    result = {
        "stage": stage.name,
        "state": "cut off" if code is None else "failed" if code else "done",
        "why": _last(chr(10).join(lines)),
        "seconds": round(time.monotonic() - began, 1),
        "command": " ".join(command),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "reports": [r for r in map(read_json, sorted(directory.glob("*.json"))) if "benchmark" in (r or {})],
        "log": lines[-200:],
    }
    if code is None:
        result["why"] = "it was interrupted" if stopped else f"it did not end within {seconds:.0f} s"
    elif code:
        result["why"] = f"exit code {code}: {result['why']}"
    elif (table := directory / TABLE).is_file():
        table.replace(output / "work" / TABLE)
    return result, stopped


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all of its group: it may have left some, and may not have ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        if number == signal.SIGTERM:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue


def chosen(names: Sequence[str], tune: bool) -> list[Stage]:
    """The stages to run, by name or by the part before a dash; with `tune`, that before what it changes."""
    everything = [STAGES[0], *([TUNE] if tune or "tune" in names else []), *STAGES[1:]]
    unknown = {n for n in names if not any(_is(stage, n) for stage in everything)}
    if unknown:
        known = ", ".join(stage.name for stage in everything)
        raise SystemExit(f"gpu_hour: no stage is called {', '.join(sorted(unknown))}; there are {known}")
    return [stage for stage in everything if not names or any(_is(stage, name) for name in names)]


def _is(stage: Stage, name: str) -> bool:
    return name in (stage.name, stage.name.partition("-")[0])


def environment_for(output: Path, rehearse: bool) -> dict[str, str]:
    """Of the stages: this checkout, the unpacked wheels, no network, the launch table that was measured."""
    path = [str(ROOT), str(output / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    table = output / "work" / TABLE
    if table.is_file():
        environment["MEGATRON_DYT_LAUNCH_TABLE"] = str(table)
    if rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "passive"}
    return environment


def main(argv: list[str] | None = None) -> int:
    """0: all stages are done; 1: some are not; 2: nothing can run here."""
    parser = argparse.ArgumentParser(prog="gpu_hour", description="see benchmarks/gpu_hour.sh")
    parser.add_argument("stages", nargs="*", help="which (default all): " + ", ".join(s.name for s in STAGES))
    parser.add_argument("--minutes", type=float, help="for all stages together (default: no limit)")
    parser.add_argument("--tune", action="store_true", help="choose the launch table by timing, then use it")
    parser.add_argument("--again", action="store_true", help="run stages that are done too")
    parser.add_argument("--rehearse", action="store_true", help="a CPU and Triton's interpreter, tiny shapes")
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "gpu-wheels")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-hour")
    args = parser.parse_args(argv)
    end = time.monotonic() + (60 * args.minutes if args.minutes else float("inf"))
    stages = chosen(args.stages, args.tune)
    # Apart from the results of a GPU, which would be taken for done.
    output = args.output.resolve() / ("rehearsal" if args.rehearse else "")
    for fault in unpack(args.wheels, output / "site"):
        print(f"gpu_hour: {fault}")
    modules = sorted({name for stage in stages for name in (*stage.needs, *stage.wants)})
    found = probe(modules, environment_for(output, args.rehearse))
    if args.rehearse:
        found["gpu"] = REHEARSAL_GPU
    if why := refusal(found):
        print(f"gpu_hour: {why}", file=sys.stderr)
        return 2
    print(f"gpu_hour: {found['gpu']['name']}, torch {found['torch']}; results in {output}", flush=True)
    states = [run_or_skip(stage, args, found, output, end) for stage in stages]
    return 0 if set(states) == {"done"} else 1


def run_or_skip(
    stage: Stage, args: argparse.Namespace, found: dict[str, Any], output: Path, end: float
) -> str:
    """Run the stage unless it is done or cannot be; say so in one line, and return its state."""
    path = output / f"{stage.name}.json"
    before = read_json(path) or {}
    if before.get("state") == "done" and not args.again:
        print(f"{stage.name:15} done before, on {before['date']}", flush=True)
        return "done"
    seconds = min(STAGE_SECONDS, end - time.monotonic())
    why = obstacle(stage, found)
    if not why and seconds < LEAST_SECONDS:
        why = "no time is left"
    stopped = None
    if why:
        result = {"stage": stage.name, "state": "left out", "why": why, "reports": []}
    else:
        print(f"{stage.name:15} {stage.what} ...", flush=True)
        environment = environment_for(output, args.rehearse)
        if stage is TUNE:  # It starts from the table that is shipped.
            environment.pop("MEGATRON_DYT_LAUNCH_TABLE", None)
        result, stopped = run(stage, seconds, output, environment, args.rehearse)
        result["lacking"] = [name for name in stage.wants if name in found["missing"]]
    if result["state"] == "done" or before.get("state") != "done":
        write_json(path, result)
    took = f" in {result['seconds']} s" if "seconds" in result else ""
    words = [f"{result['state']}{took}", *([] if result["state"] == "done" else [result["why"]])]
    words += [f"without {name}" for name in result.get("lacking", ())]
    print(f"{stage.name:15} {', '.join(words)}", flush=True)
    if stopped:
        raise stopped
    return str(result["state"])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running stage on the way out
    sys.exit(main())
