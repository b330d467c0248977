"""The container recipe takes our pins for what we depend on, and copies what is there. Not built here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = (ROOT / "examples/container/Dockerfile").read_text()
# NVIDIA's image has these, built for each other.
OF_THE_IMAGE = {"torch", "triton", "numpy"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(*extras: str) -> set[str]:
    """What pyproject.toml asks for, without versions and our own name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    names = {canonical(re.split(r"[\[<>=; ]", line)[0]) for line in lines}
    return names - {"megatron-dyt"}


def test_every_direct_dependency_has_our_pin() -> None:
    pattern = re.search(r"grep -E '(.+)'", RECIPE)
    assert pattern is not None
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line.split("==")[0]) for line in lines if re.match(pattern[1], line)}
    extras = re.search(r"--editable '\.\[(.+)\]'", RECIPE)
    assert extras is not None
    assert requirements(*extras[1].split(",")) - OF_THE_IMAGE <= pinned
    named = re.search(r"\((.+)\)", pattern[1])
    assert named is not None
    assert pinned == {canonical(name) for name in named[1].split("|")}
    assert not pinned & OF_THE_IMAGE


def test_what_it_copies_is_there() -> None:
    copied = [word for line in re.findall(r"^COPY (.+)$", RECIPE, re.M) for word in line.split()[:-1]]
    assert "constraints.txt" in copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {build["project"]["readme"], *build["project"]["license-files"], "setup.py"} <= {*copied}


def test_the_base_is_one_image_with_a_version() -> None:
    assert re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", RECIPE, re.M)
    assert re.findall(r"^FROM (.+)$", RECIPE, re.M) == ["${BASE}"]
