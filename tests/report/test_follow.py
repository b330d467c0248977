import io
from pathlib import Path

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.report import follow

STEP = (
    " [2026-01-02 03:04:05] iteration {done:8d}/{total:8d} | consumed samples: 80 | elapsed time per "
    "iteration (ms): {ms:.1f} | learning rate: 1.0E-03 | lm loss: {loss:.6E} | grad norm: 1.0 |\n"
)


def test_progress_gives_loss_pace_and_time_left() -> None:
    log = [STEP.format(done=10, total=100, ms=500.0, loss=5.25)]
    assert list(follow.progress(log, "dyt")) == ["dyt: step 10/100, loss 5.250, 0.50 s a step, 45 s left"]


def test_time_left_follows_the_recent_pace() -> None:
    log = [
        STEP.format(done=10, total=100, ms=1000.0, loss=5),
        STEP.format(done=20, total=100, ms=2000.0, loss=5),
    ]
    # 0.7 * 1 s + 0.3 * 2 s = 1.3 s for each of 80 steps.
    assert list(follow.progress(log, "x"))[1].endswith("1 min 44 s left")


def test_what_a_person_must_see_is_shown_and_noise_is_not() -> None:
    log = [
        "INFO: something\n",
        "DyT attn  4 sites\n",
        "WARNING: DyT ffn: alpha*std(x) = 9\n",
        "megatron_dyt: CPU runtime set --use-cpu-initialization\n",
        " validation loss at iteration 50 | lm loss value: 4.5E+00 | lm loss PPL: 9.0E+01 |\n",
        " validation loss at iteration 60 on validation set | lm loss value: 4.25E+00 | lm loss PPL: 9 |\n",
        "  successfully saved checkpoint from iteration 50 to x\n",
        "Traceback (most recent call last):\n",
        '  File "x.py", line 1\n',
        "ValueError: no\n",
        "  indented noise\n",
    ]
    assert list(follow.progress(log, "r")) == [
        "DyT attn  4 sites",
        "WARNING: DyT ffn: alpha*std(x) = 9",
        "megatron_dyt: CPU runtime set --use-cpu-initialization",
        "r: validation loss 4.5000 (during training, step 50)",
        "r: validation loss 4.2500 (on validation set, step 60)",
        "successfully saved checkpoint from iteration 50 to x",
        "Traceback (most recent call last):",
        '  File "x.py", line 1',
        "ValueError: no",
    ]


def test_the_whole_log_is_kept_and_appended_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "dyt" / "train.log"
    log.parent.mkdir()
    log.write_text("first run\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("noise\n" + STEP.format(done=1, total=2, ms=1000, loss=3)))
    follow.main([str(log)])
    assert log.read_text().startswith("first run\nnoise\n [2026")
    assert capsys.readouterr().out.startswith("dyt: step 1/2, loss 3.000, 1.00 s a step, 1 s left\n")


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; make it first"):
        follow.main([str(tmp_path / "no" / "train.log")])
