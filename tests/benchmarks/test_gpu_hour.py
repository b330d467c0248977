"""The GPU hour without a GPU: its runner on stand-in stages and machines, and a rehearsal with the network
off."""

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_dyt.ops.triton_launch import PLANS, read_table
from tests.ops.interpreter import interpreted_kernels

ROOT = Path(__file__).parents[2]
# A torch that says of its GPU what a test wants.
TORCH = """
import types, warnings
__version__ = "2.11.0+cu130"
def init():
    {init}
cuda = types.SimpleNamespace(
    init=init, get_device_name=lambda: "Some GPU", mem_get_info=lambda: ({free}, 80 * 10**9),
    get_device_capability=lambda: {capability},
)
"""
REPORT = '{"benchmark": "some", "results": []}'


@pytest.fixture
def hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu_hour.py on a machine with a good GPU; `machine` changes that."""
    machine(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "machine"))
    return importlib.import_module("gpu_hour")


def machine(
    tmp_path: Path, init: str = "pass", free: int = 79 * 10**9, capability: tuple[int, int] = (9, 0)
) -> None:
    for package, text in (
        ("torch", TORCH.format(init=init, free=free, capability=capability)),
        ("triton", ""),
    ):
        directory = tmp_path / "machine" / package
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "__init__.py").write_text(text)


def stage(hour: ModuleType, tmp_path: Path, name: str, code: str, **options: Any) -> Any:
    script = tmp_path / f"{name}.py"
    script.write_text(code)
    command = f"{script} {{dir}}"
    return hour.Stage(name, f"the stage {name}", command, command, **options)


def run(hour: ModuleType, tmp_path: Path, *options: str) -> int:
    places = ["--wheels", str(tmp_path / "wheels"), "--output", str(tmp_path / "out")]
    code: int = hour.main([*places, *options])
    return code


def states(tmp_path: Path, part: str = "") -> dict[str, str]:
    paths = (tmp_path / "out" / part).glob("*.json")
    return {path.stem: json.loads(path.read_text())["state"] for path in paths}


def test_every_stage_leaves_a_result_and_what_is_done_is_not_run_again(
    hour: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = f"import sys; open(sys.argv[1] + '/r.json', 'w').write({REPORT!r})"
    stages = (
        stage(hour, tmp_path, "good", f"{write}; open({str(tmp_path / 'calls')!r}, 'a').write('x')"),
        stage(hour, tmp_path, "bad", "print('half'); raise SystemExit('it broke')"),
        stage(hour, tmp_path, "lacking", "", needs=("no_such_module",)),
        stage(hour, tmp_path, "large", "", gigabytes=100),
        stage(hour, tmp_path, "last", "", wants=("no_such_peer",)),
    )
    monkeypatch.setattr(hour, "STAGES", stages)
    assert run(hour, tmp_path) == 1
    assert states(tmp_path) == {
        **{"good": "done", "bad": "failed", "lacking": "left out", "large": "left out", "last": "done"},
    }
    lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: line.partition(" ")[2].strip() for line in lines if not line.endswith("...")}
    assert said["bad"].endswith("exit code 1: it broke")
    assert "no_such_module is neither installed nor among the wheels" in said["lacking"]
    assert said["large"] == "left out, Some GPU has 79 GB of 80 free; 100 are needed"
    assert said["last"].endswith("without no_such_peer")
    good = json.loads((tmp_path / "out" / "good.json").read_text())
    assert good["reports"] == [json.loads(REPORT)]

    run(hour, tmp_path, "good")
    assert (tmp_path / "calls").read_text() == "x"
    run(hour, tmp_path, "good", "--again")
    assert (tmp_path / "calls").read_text() == "xx"


def test_a_stage_that_was_cut_off_is_taken_up(
    hour: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hour, "STAGES", (stage(hour, tmp_path, "slow", "import time; time.sleep(1000)"),))
    monkeypatch.setattr(hour, "LEAST_SECONDS", 0)
    with monkeypatch.context() as short:
        short.setattr(hour, "STAGE_SECONDS", 0.7)
        assert run(hour, tmp_path) == 1
    assert states(tmp_path) == {"slow": "cut off"}
    assert "it did not end within 1 s" in capsys.readouterr().out
    (tmp_path / "slow.py").write_text("")
    assert run(hour, tmp_path) == 0
    assert states(tmp_path) == {"slow": "done"}


def test_an_interrupted_stage_keeps_what_it_has_measured(
    hour: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = f"import sys, time; open(sys.argv[1] + '/r.json', 'w').write({REPORT!r}); time.sleep(1000)"
    monkeypatch.setattr(
        hour, "STAGES", (stage(hour, tmp_path, "slow", write), stage(hour, tmp_path, "no", ""))
    )
    report = tmp_path / "out" / "work" / "slow" / "r.json"
    wait = subprocess.Popen.wait

    def interrupted(process: Any, timeout: float | None = None) -> int:
        if timeout == hour.STAGE_SECONDS:
            while not (report.is_file() and report.read_text() == REPORT):
                time.sleep(0.05)
            raise SystemExit(143)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(SystemExit):
        run(hour, tmp_path)
    assert states(tmp_path) == {"slow": "cut off"}
    assert json.loads((tmp_path / "out" / "slow.json").read_text())["reports"] == [json.loads(REPORT)]


def test_a_table_serves_the_other_stages_and_no_second_tuning(
    hour: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = "MEGATRON_DYT_LAUNCH_TABLE"
    seen = str(tmp_path / "seen")
    look = f"import os, sys; open({seen!r}, 'a').write(os.environ.get({variable!r}, '-') + ';')"
    tune = stage(
        hour, tmp_path, "tune", f"{look}; open(sys.argv[1] + '/launch_table.json', 'w').write('{{}}')"
    )
    monkeypatch.setattr(hour, "TUNE", tune)
    monkeypatch.setattr(hour, "STAGES", (stage(hour, tmp_path, "other", look),))
    for _ in range(2):
        assert run(hour, tmp_path, "--tune", "--again") == 0
    table = str(tmp_path / "out" / "work" / "launch_table.json")
    # The other stage comes first: the second time it has the table of the first time.
    assert (tmp_path / "seen").read_text() == f"-;-;{table};-;"


def test_a_stage_that_fails_again_keeps_its_result(
    hour: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hour, "STAGES", (stage(hour, tmp_path, "good", ""),))
    assert run(hour, tmp_path) == 0
    (tmp_path / "good.py").write_text("raise SystemExit(3)")
    assert run(hour, tmp_path, "--again") == 1
    assert states(tmp_path) == {"good": "done"}


def test_a_rehearsal_is_not_taken_for_a_run(
    hour: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hour, "STAGES", (stage(hour, tmp_path, "good", ""),))
    machine(tmp_path, init='raise RuntimeError("Found no NVIDIA driver")')
    assert run(hour, tmp_path, "--rehearse") == 0
    assert states(tmp_path, "rehearsal") == {"good": "done"}
    assert states(tmp_path) == {}


def test_without_time_a_stage_is_left_out(
    hour: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hour, "STAGES", (stage(hour, tmp_path, "good", ""),))
    assert run(hour, tmp_path, "--minutes", "0.5") == 1
    assert "left out, no time is left" in capsys.readouterr().out


OLD_DRIVER = 'warnings.warn("The NVIDIA driver on your system is too old"); raise RuntimeError("no CUDA")'


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"init": OLD_DRIVER},
            "finds no GPU that it can use: no CUDA The NVIDIA driver on your system is too old",
        ),
        ({"init": 'raise RuntimeError("Found no NVIDIA driver")'}, "can use: Found no NVIDIA driver"),
        ({"capability": (7, 5)}, "Some GPU is sm_75; the kernels need sm_80 (A100) or later"),
        ({"init": "import os; os._exit(3)"}, "finds no GPU that it can use: it said nothing"),
    ],
    ids=["old driver", "no GPU", "old GPU", "torch dies"],
)
def test_a_machine_that_cannot_run_them_is_refused_in_one_line(
    hour: ModuleType, tmp_path: Path, options: dict, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "out" / "correctness.json"
    earlier.parent.mkdir()
    earlier.write_text('{"state": "done"}')
    machine(tmp_path, **options)
    assert run(hour, tmp_path) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert states(tmp_path) == {"correctness": "done"}


def test_an_unknown_stage_is_named(hour: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no stage is called tain; there are correctness, kernels-4096"):
        run(hour, tmp_path, "tain")


def make_wheel(directory: Path, name: str, filler: int = 0) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "#" * filler)
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def test_wheels_are_dealt_into_folders_and_joined_again(hour: ModuleType, tmp_path: Path) -> None:
    wheels = importlib.import_module("gpu_wheels")
    made = [make_wheel(tmp_path / "made", name, size) for name, size in (("one", 100), ("two", 3000))]
    wheels.deal(made, tmp_path / "wheels", limit=2000)
    folders = sorted((tmp_path / "wheels").iterdir())
    assert [folder.name for folder in folders] == ["1", "2"]
    assert all(sum(file.stat().st_size for file in folder.iterdir()) <= 2000 for folder in folders)
    site = tmp_path / "site"
    assert hour.unpack(tmp_path / "wheels", site) == []
    assert (site / "two" / "__init__.py").read_text() == "#" * 3000

    (tmp_path / "wheels" / "2").rename(tmp_path / "elsewhere")
    assert hour.unpack(tmp_path / "wheels", tmp_path / "other") == [
        "two-1.0-py3-none-any.whl: piece 1 of 2 is the last here; bring the others"
    ]
    assert (tmp_path / "other" / "one").is_dir()


def test_a_damaged_wheel_is_named_and_the_others_are_there(hour: ModuleType, tmp_path: Path) -> None:
    broken = make_wheel(tmp_path / "wheels", "broken", 100)
    broken.write_bytes(broken.read_bytes()[:-30])
    make_wheel(tmp_path / "wheels", "whole")
    (fault,) = hour.unpack(tmp_path / "wheels", tmp_path / "site")
    assert fault.startswith("broken-1.0-py3-none-any.whl is damaged")
    assert (tmp_path / "site" / "whole").is_dir()


def test_a_stage_sees_the_wheels_and_where_their_pth_files_point(
    hour: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "wheels", "pointing")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("pointing.pth", "import sys; sys.path.append(__import__('pointing').__path__[0])")
        archive.writestr("pointing/deep_inside.py", "")
    monkeypatch.setattr(hour, "STAGES", (stage(hour, tmp_path, "good", "", needs=("deep_inside",)),))
    assert run(hour, tmp_path) == 0


def test_what_a_wheel_has_for_an_installer_is_importable(hour: ModuleType, tmp_path: Path) -> None:
    """All that `gpu_wheels.check` lets through, but files for data/share."""
    wheel = make_wheel(tmp_path / "wheels", "split")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.mkdir("split-1.0.data/purelib")
        archive.writestr("split-1.0.data/purelib/split/pure.py", "pure")
        archive.writestr("split-1.0.data/platlib/built.py", "built")
        archive.writestr("split-1.0.data/data/share/split", "")
    importlib.import_module("gpu_wheels").check(wheel)
    site = tmp_path / "site"
    assert hour.unpack(tmp_path / "wheels", site) == []
    assert (site / "split" / "pure.py").read_text() == "pure"
    assert (site / "built.py").read_text() == "built"
    assert (site / "split" / "__init__.py").is_file()
    assert [path.name for path in (site / "split-1.0.data").iterdir()] == ["data"]


def test_a_wheel_of_what_is_installed_stays_packed(hour: ModuleType, tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", "pytest")
    assert hour.unpack(tmp_path / "wheels", tmp_path / "site") == []
    assert not (tmp_path / "site").exists()


def rehearse(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The script on this machine, from an empty folder, without a network where that can be taken away."""
    # torchrun talks to itself by the loopback, which a new network has, but not up.
    alone = ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
    offline = alone if subprocess.run([*alone, "true"]).returncode == 0 else []
    environment = {**os.environ, "PY": sys.executable, "OUT": str(tmp_path / "out"), "WHEELS": str(tmp_path)}
    command = [*offline, "bash", str(ROOT / "benchmarks" / "gpu_hour.sh"), "--rehearse", *options]
    (tmp_path / "empty").mkdir()
    return subprocess.run(
        command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # the interpreter's own
def test_rehearsal_of_tuning(tmp_path: Path) -> None:
    tune = importlib.import_module("tune")
    with interpreted_kernels():
        tune.main(["--rehearse", "--rounds", "2", "--output", str(tmp_path)])
    # What was chosen is a table that the kernels can read.
    table = read_table(tmp_path / "launch_table.json")
    assert table.keys() == {("sm90", 2), ("sm90", 4)}
    assert table["sm90", 2].warps == PLANS["sm90", 2].warps
    (figures,) = tmp_path.glob("tune-*.json")
    report = json.loads(figures.read_text())
    assert {row["part"] for row in report["results"]} == {"forward", "tanh", "erf"}


@pytest.mark.skipif("MEGATRON_DYT_GPU_REHEARSAL" not in os.environ, reason="two minutes: make gpu-rehearsal")
def test_rehearsal_of_everything(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--tune")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = states(tmp_path, "rehearsal")
    assert set(found.values()) == {"done"}
    assert len(found) == 11
