import errno
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dyt.errors import TrainingFault, UserError, describe, root_user_error, run_main


def ended(main: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        run_main(main)  # type: ignore[arg-type]
    return end.value.code, capsys.readouterr().err  # type: ignore[return-value]


def test_a_user_error_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("alpha is 0; give > 0")

    assert ended(main, capsys) == (2, "megatron_dyt: error: alpha is 0; give > 0\n")


def test_a_fault_of_training_is_one_line_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise TrainingFault("step 3: alpha")

    assert ended(main, capsys) == (1, "megatron_dyt: stopped: step 3: alpha\n")


def test_a_user_error_that_megatron_wrapped_is_still_found(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        try:
            raise UserError("no such norm")
        except UserError as error:
            raise RuntimeError("when instantiating") from error

    code, text = ended(main, capsys)
    assert code == 2
    assert text.splitlines()[-1] == "megatron_dyt: error: no such norm"
    assert "Traceback" in text


def test_a_full_disk_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    code, text = ended(main, capsys)
    assert code == 1
    assert "the disk is full" in text.splitlines()[-1]
    assert "last complete checkpoint" in text.splitlines()[-1]


def test_other_failures_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = ended(lambda: 1 / 0, capsys)
    assert code == 1
    assert text.startswith("Traceback")
    assert text.splitlines()[-1] == "megatron_dyt: stopped: ZeroDivisionError: division by zero"


def test_a_failed_checkpoint_which_is_no_exception_to_python_has_its_line_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        raise CheckpointException("read", {})

    code, text = ended(main, capsys)
    assert code == 1
    assert text.splitlines()[-1].startswith("megatron_dyt: stopped: CheckpointException")


def test_an_exit_code_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise SystemExit(5)

    assert ended(main, capsys) == (5, "")


def test_interrupted_and_successful_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "3")
    code, text = ended(interrupted, capsys)
    assert code == 130
    assert text.startswith("megatron_dyt [rank 3]: interrupted")
    assert ended(lambda: None, capsys) == (0, "")
    assert ended(lambda: 7, capsys) == (7, "")


def test_a_cycle_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert root_user_error(first) is None


def test_an_error_without_text_is_named() -> None:
    assert describe(ValueError()) == "ValueError: no message"


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (
            "assert (\n        args.hidden_size\n        % args.heads == 0\n    )",
            "AssertionError: `assert ( args.hidden_size % args.heads == 0 )` does not hold "
            "(megatron_like.py:2); here --hidden-size 66, --heads 4",
        ),
        (
            "self = args; assert self.hidden_size < 6",
            "AssertionError: `self = args; assert self.hidden_size < 6` does not hold "
            "(megatron_like.py:2); here hidden_size = 66",
        ),
        ("raise ValueError", "ValueError: `raise ValueError` raised it (megatron_like.py:2)"),
    ],
)
def test_an_error_without_text_shows_its_condition_and_the_flags_in_it(
    tmp_path: Path, source: str, line: str
) -> None:
    file = tmp_path / "megatron_like.py"
    file.write_text(f"def check(args):\n    {source}\n")
    check = runpy.run_path(str(file))["check"]
    with pytest.raises((AssertionError, ValueError)) as caught:
        check(SimpleNamespace(hidden_size=66, heads=4))
    assert describe(caught.value) == line


@pytest.mark.parametrize(("lines", "buffered"), [(1, True), (100000, True), (1, False)])
def test_output_that_nobody_reads_ends_silently(lines: int, buffered: bool) -> None:
    """Whether the pipe breaks while lines are printed or when all is flushed at the end."""
    script = f"from megatron_dyt.errors import run_main; run_main(lambda: print('x\\n' * {lines}))"
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-c", script],
        **{"stdout": write, "stderr": subprocess.PIPE, "text": True, "check": False},
        env=os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"},
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_a_closed_standard_output_takes_what_is_printed() -> None:
    script = "from megatron_dyt.errors import run_main; run_main(lambda: print('x'))"
    ended = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_another_broken_pipe_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    code, text = ended(main, capsys)
    assert code == 1
    assert text.splitlines()[-1].startswith("megatron_dyt: stopped: BrokenPipeError")
