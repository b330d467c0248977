"""The step that datatrove's executors run: killed and started again, and submitted to a made-up Slurm."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dyt.errors import UserError
from tests.data.samples import prepare

pytest.importorskip("datatrove")

# Two tasks on datatrove's local executor, which needs no cluster: the same step, the same way to a task.
LOCALLY = """
import sys
from datatrove.executor import LocalPipelineExecutor
from megatron_dyt.data import prepare, sources
from megatron_dyt.data.dataset_manifest import SENTENCEPIECE, Fields, Filters
from megatron_dyt.data.slurm import WriteShards
from pathlib import Path

if __name__ == "__main__":
    corpus, model, output = sys.argv[1:]
    settings = prepare.find_settings(SENTENCEPIECE, model, True, True, Fields(), Filters())
    shards = prepare.find_shards(sources.find([corpus]), settings, prepare.Destination(Path(output)))
    step = WriteShards(shards, settings)
    LocalPipelineExecutor([step], tasks=2, logging_dir=output + ".logs", skip_completed=False).run()
"""
# What a cluster of this machine does: the tasks of an array one after the other, each a process of its own.
SBATCH = """#!/bin/bash
script=${@: -1}
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
grep '^#SBATCH' "$script" >> "$SBATCH_LOG"
for task in $(seq 0 "$last"); do
  SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here bash "$script" >> "$SBATCH_LOG" 2>&1
done
echo "Submitted batch job 17"
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""
SCONTROL = "#!/bin/bash\necho here\n"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


@pytest.mark.distributed
def test_two_tasks_that_are_killed_and_started_again_write_the_same_files(
    many: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    script, out = tmp_path / "locally.py", tmp_path / "out"
    script.write_text(LOCALLY)
    command = [sys.executable, str(script), str(many), str(tokenizer_model), str(out)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("*.manifest.json")) and time.monotonic() < deadline:
        assert process.poll() is None, "the command has ended by itself"
        time.sleep(0.01)
    # Its worker processes too.
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path.name.split(".")[0] for path in out.glob("*.manifest.json")}
    assert 0 < len(done) < 10
    for path in out.iterdir():
        os.utime(path, (1, 1))
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert {path.name.split(".")[0] for path in out.iterdir() if path.stat().st_mtime == 1} == done
    prepare("--input", many, "--tokenizer-model", tokenizer_model, "--output", tmp_path / "expected")
    (tmp_path / "expected" / "manifest.json").unlink()
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.distributed
def test_a_cluster_writes_the_same_files_as_one_machine(
    many: Path,
    tokenizer_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(script)
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "sbatch.log"))
    flags = ("--tokenizer-model", tokenizer_model, "--output")
    some = ("--input", *(many / f"{number:02d}.jsonl" for number in range(3)), *flags)
    # One is finished.
    prepare("--input", many / "01.jsonl", *flags, tmp_path / "out")
    prepare(
        *some,
        tmp_path / "out",
        "--slurm-partition",
        "cpu",
        "--slurm-option",
        "account=team",
        "qos=low",
        "--workers",
        3,
    )
    said = capsys.readouterr().out
    assert "out: submitted 2 tasks, and a job for the manifest" in said
    log = (tmp_path / "sbatch.log").read_text()
    prepare(*some, tmp_path / "expected")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected"), log
    for directive in ("array=0-1%3", "partition=cpu", "account=team", "qos=low", "time=24:00:00"):
        assert f"#SBATCH --{directive}\n" in log


def test_a_machine_without_slurm_is_named(
    many: Path, tokenizer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    flags = ("--input", many, "--tokenizer-model", tokenizer_model, "--output", tmp_path / "out")
    with pytest.raises(UserError, match="sbatch is not on this machine"):
        prepare(*flags, "--slurm-partition", "cpu")
