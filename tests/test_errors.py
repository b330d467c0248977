import errno
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dyt.errors import TrainingFault, UserError, describe, root_user_error, run_main


def ended(main: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        run_main(main)  # type: ignore[arg-type]
    return end.value.code, capsys.readouterr().err  # type: ignore[return-value]


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("alpha is 0; give > 0"), 2, "megatron_dyt: error: alpha is 0; give > 0\n"),
        (TrainingFault("step 3: alpha"), 1, "megatron_dyt: stopped: step 3: alpha\n"),
        (SystemExit(5), 5, ""),
    ],
    ids=["user error", "fault of training", "exit code"],
)
def test_what_is_known_has_no_traceback(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(raising(error), capsys) == (code, said)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full.*last complete checkpoint"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero$"),
        (CheckpointException("read", {}), "CheckpointException"),  # no Exception to Python
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "BrokenPipeError"),  # not of standard output
    ],
    ids=["full disk", "other", "failed checkpoint", "broken pipe"],
)
def test_other_failures_have_their_line_after_the_traceback(
    error: BaseException, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = ended(raising(error), capsys)
    assert code == 1
    assert text.startswith("Traceback")
    assert re.match(f"megatron_dyt: stopped: .*{line}", text.splitlines()[-1])


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


def test_interrupted_and_successful_ends(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    code, text = ended(raising(KeyboardInterrupt()), capsys)
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
