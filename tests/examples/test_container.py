"""The container recipe takes our pins for what we depend on, and copies what is there. Not built here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from examples.container.pins import INDIRECT, OF_THE_IMAGE, name_of, pins

ROOT = Path(__file__).resolve().parents[2]
RECIPE = (ROOT / "examples/container/Dockerfile").read_text()
EXTRAS = re.findall(r"--editable '\.\[(.+)\]'", RECIPE)[0].split(",")


def test_every_direct_dependency_has_our_pin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(each for extra in EXTRAS for each in project["optional-dependencies"][extra]),
    ]
    pinned = pins(ROOT, EXTRAS)
    assert all(re.fullmatch(r"[\w.-]+==[\w.+-]+", line) for line in pinned)
    direct = {name_of(each) for each in asked} - OF_THE_IMAGE - {"megatron-dyt"}
    assert {name_of(line) for line in pinned} == direct | INDIRECT
    assert {"megatron-core", "click", "transformers"} <= {name_of(line) for line in pinned}


def test_pins_are_made_for_what_is_installed() -> None:
    assert re.findall(r"pins\.py (.+) > /tmp/pins\.txt", RECIPE) == [" ".join(EXTRAS)]


def test_what_it_copies_is_there() -> None:
    copied = [word for line in re.findall(r"^COPY (.+)$", RECIPE, re.M) for word in line.split()[:-1]]
    assert "constraints.txt" in copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {build["project"]["readme"], *build["project"]["license-files"], "setup.py"} <= {*copied}


def test_the_base_is_one_image_with_a_version() -> None:
    assert re.search(r"^ARG BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", RECIPE, re.M)
    assert re.findall(r"^FROM (.+)$", RECIPE, re.M) == ["${BASE}"]
