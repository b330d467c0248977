from pathlib import Path

from examples.quickstart.record import main
from megatron_dyt.data.files import read_json


def test_a_recorded_command_is_recognised_and_another_is_not(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    command = ["python", "-m", "x", "--lr", "4e-3", "--title", "two words"]
    assert main(["--check", str(file), "--", *command]) == 1
    assert main(["--write", str(file), "--learning-rate", "4e-3", "--seconds", "12", "--", *command]) == 0
    assert read_json(file) == {
        "command": "python -m x --lr 4e-3 --title 'two words'",
        "learning_rate": 0.004,
        "seconds": 12.0,
    }
    assert main(["--check", str(file), "--", *command]) == 0
    assert main(["--check", str(file), "--", *command, "--seed", "2"]) == 1
