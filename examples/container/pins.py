"""Print constraints.txt's pins of what pyproject.toml asks for: `pins.py EXTRA ...`, in the checkout's top.

What NVIDIA's image has built for each other stays as it is there, and has no pin.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

OF_THE_IMAGE = {"torch", "triton", "numpy"}
# megatron-core[training] asks for it.
INDIRECT = {"wandb"}


def name_of(requirement: str) -> str:
    """A package's name, in the one spelling of the package index."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=; ]", requirement)[0]).lower()


def pins(root: Path, extras: list[str]) -> list[str]:
    """Lines such as "click==8.3.1" for the package's dependencies and those of `extras`."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"]]
    for extra in extras:
        asked += project["optional-dependencies"][extra]
    names = {name_of(each) for each in asked} - OF_THE_IMAGE | INDIRECT
    lines = (root / "constraints.txt").read_text().splitlines()
    return [line for line in lines if name_of(line) in names]


if __name__ == "__main__":
    print("\n".join(pins(Path.cwd(), sys.argv[1:])))
