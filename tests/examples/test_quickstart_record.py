import os
import subprocess
from pathlib import Path

import pytest

from examples.quickstart.record import main
from megatron_dyt.atomic import read_json
from tests.examples import fakes

COMMAND = ["python", "-m", "x", "--lr", "4e-3", "--title", "two words"]


def begin(directory: Path, data: Path, command: list[str]) -> None:
    main(["--begin", str(directory), "--data", str(data), "--", *command])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "manifest.json"
    file.write_text("{}")
    return file


def test_the_same_command_continues_and_is_recorded_at_the_end(tmp_path: Path, data: Path) -> None:
    run = tmp_path / "run"
    begin(run, data, COMMAND)
    (run / "checkpoint").mkdir()
    begin(run, data, COMMAND)
    assert (run / "checkpoint").exists()
    main(["--finish", str(run), "--learning-rate", "4e-3", "--seconds", "12"])
    assert read_json(run / "run.json") == {
        "command": "python -m x --lr 4e-3 --title 'two words'",
        "learning_rate": 0.004,
        "seconds": 12.0,
    }


@pytest.mark.parametrize("change", ["command", "data"])
def test_another_command_or_other_data_start_over(tmp_path: Path, data: Path, change: str) -> None:
    run = tmp_path / "run"
    begin(run, data, COMMAND)
    main(["--finish", str(run), "--learning-rate", "4e-3", "--seconds", "12"])
    if change == "data":
        data.write_text('{"other": 1}')
    begin(run, data, [*COMMAND, "--seed", "2"] if change == "command" else COMMAND)
    assert sorted(path.name for path in run.iterdir()) == ["begun.json"]


@pytest.mark.parametrize(("python", "code"), [("on-the-path", 3), ("nowhere", 1)])
def test_the_interpreter_may_be_a_name_on_the_path(tmp_path: Path, python: str, code: int) -> None:
    fakes.command(tmp_path, "on-the-path", "exit 3")
    script = Path(__file__).parents[2] / "examples/quickstart.sh"
    places = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OUT": str(tmp_path / "out"), "PY": python}
    ended = subprocess.run(["bash", str(script)], env=os.environ | places, capture_output=True, text=True)
    assert ended.returncode == code
    assert ("quickstart: nowhere is missing" in ended.stderr) == (code == 1)
