"""docs/flags.md has every flag of the plugin, with its choices and its default."""

import argparse
import re
from pathlib import Path

import pytest

from megatron_dyt.mcore import args

PAGE = (Path(__file__).resolve().parents[2] / "docs/flags.md").read_text()


def plugin_actions() -> list[argparse.Action]:
    """What the plugin adds to a parser that has what it changes in Megatron's."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--normalization", choices=["RMSNorm"])
    parser.add_argument("--init-method-std", type=float, default=0.02)
    before = len(parser._actions)
    args.wrap_add_arguments(lambda parser: parser)(parser)
    return parser._actions[before:]


def rows() -> dict[str, tuple[str, str]]:
    """{flag: (first cell, last cell)}; --dyt-alpha-init-{a,b} stands for both."""
    found = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        for flag in re.findall(r"--\w[\w-]*(?<=-)\{[\w,]+\}|--\w[\w-]*", cells[0]) if len(cells) == 3 else []:
            stem, _, roles = flag.partition("{")
            for role in roles.rstrip("}").split(","):
                found[stem + role] = (cells[0], cells[2])
    return found


@pytest.mark.parametrize("action", plugin_actions(), ids=lambda action: action.option_strings[0])
def test_flag_is_on_the_page(action: argparse.Action) -> None:
    for flag in action.option_strings:
        assert flag in rows()
        first, default = rows()[flag]
        if action.choices:
            assert "{" + ",".join(map(str, action.choices)) + "}" in first
        if isinstance(action.default, str):
            assert action.default in default


def test_page_has_no_other_flag() -> None:
    flags = {flag for action in plugin_actions() for flag in action.option_strings}
    assert set(rows()) == flags
