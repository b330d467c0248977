"""Flags with expressions: values against numbers computed here, and refusals that quote what was given."""

import pytest

from megatron_dyt.errors import UserError
from megatron_dyt.sweep import flags


def filled(text: str, **names: str) -> list[str]:
    words = flags.split(text)
    return flags.fill(words, flags.values(words) | names)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("1/sqrt(hidden_size)", "0.0721688"),
        ("hidden_size", "192"),
        ("lr", "8e-3"),  # alone: as it is written
        ("2*lr", "0.016"),
        ("lr * sqrt(192 / hidden_size)", "0.008"),
        ("8 * hidden_size / 3", "512"),
        ("64*ceil(8*hidden_size/3/64)", "512"),
        ("max(1, hidden_size // 32) - -1", "7"),
        ("2**0.5", "1.41421"),
        ("chained", "384"),
    ],
)
def test_expression(expression: str, expected: str) -> None:
    words = filled(f"--hidden-size 192 --chained {{2*hidden_size}} --x {{{expression}}}", lr="8e-3")
    assert words[-1] == expected


def test_the_last_of_a_flag_counts_as_in_argparse() -> None:
    assert filled("--hidden-size 64 --std {hidden_size} --hidden-size=128")[3] == "128"


def test_a_run_may_have_no_flags() -> None:
    assert filled("") == []


def test_words_are_split_as_by_a_shell() -> None:
    assert filled("--a 'b c' --d") == ["--a", "b c", "--d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--x {width}", "width is neither an axis"),
        ("--swiglu --x {swiglu}", "swiglu is neither"),
        ("--x {1/0}", "division by zero"),
        ("--x {sqrt(-1)}", "sqrt"),
        ("--x {2**1e9}", "cannot be computed"),
        ("--x {__import__('os')}", "is none of what is allowed"),
        ("--x {(1).real}", "is none of what is allowed"),
        ("--x {[1][0]}", "is none of what is allowed"),
        ("--x {1+}", "cannot be computed"),
        ("--x {}", "cannot be computed"),
        ("--norm RMSNorm --x {2*norm}", "cannot be computed"),
        ("--x {y} --y {x}", "uses itself"),
        ("--x 'open", "quotation"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        filled(text)
