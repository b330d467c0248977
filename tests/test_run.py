"""`python -m megatron_dyt.run`: somebody else's script, with DyT in it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_dyt
from megatron_dyt import cpu, run
from megatron_dyt.errors import UserError

SCRIPT = """
import json, sys
from megatron.training.arguments import parse_args
import neighbour
args = parse_args()
print(json.dumps([__name__, sys.argv, neighbour.NAME, args.normalization]))
"""


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["run"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield
    sys.modules.pop("neighbour", None)
    cpu.disable()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("NAME = 'found beside the script'")
    path = tmp_path / "train_it.py"
    path.write_text(SCRIPT)
    return path


def last_line(capsys: pytest.CaptureFixture[str]) -> object:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.needs("training_loop")
def test_a_script_sees_what_it_would_see_alone(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.main(["--device", "cpu", str(script), "--normalization", "DyT", "--micro-batch-size", "1"])
    argv = [str(script), "--normalization", "DyT", "--micro-batch-size", "1"]
    assert last_line(capsys) == ["__main__", argv, "found beside the script", "DyT"]
    assert megatron_dyt.is_registered()
    assert cpu.is_enabled()


@pytest.mark.needs("training_loop")
def test_a_module(script: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(script.parent))
    run.main(["--device=cpu", "-m", "train_it", "--micro-batch-size", "1"])
    argv = [str(script), "--micro-batch-size", "1"]
    assert last_line(capsys) == ["__main__", argv, "found beside the script", "LayerNorm"]


def test_the_scripts_exit_code_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "ends.py"
    script.write_text("raise SystemExit(7)")
    with pytest.raises(SystemExit) as ended:
        run.main(["--device", "cpu", str(script)])
    assert ended.value.code == 7


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no script was given"),
        (["--device", "cpu"], "no script was given"),
        (["-m"], "no script was given"),
        (["--devices", "cpu", "x.py"], "unknown option '--devices' before the script"),
        (["--lr", "1"], "unknown option '--lr' before the script"),
        (["nowhere.py"], "no such script: 'nowhere.py'"),
    ],
)
def test_wrong_command_lines(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run.main(argv)
