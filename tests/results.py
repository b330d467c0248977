"""`pytest --record-results DIRECTORY`: the outcome of every test, in DIRECTORY/MEGATRON_VERSION.json.

`scripts/compatibility.py` makes docs/compatibility.md of these files.
"""

import datetime
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_dyt.atomic import write_json


class Recorder:
    """Keeps the outcomes of a session and writes them when it ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that failed anywhere failed; one that was skipped says so in its set-up.
        if report.when == "call" or report.outcome != "passed":
            if self.outcomes.get(report.nodeid) != "failed":
                self.outcomes[report.nodeid] = report.outcome
            if report.skipped and isinstance(report.longrepr, tuple):
                self.reasons[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")

    def pytest_sessionfinish(self) -> None:
        if not self.outcomes:
            return
        import torch

        version = importlib.metadata.version("megatron-core")
        record: dict[str, Any] = {
            "megatron": version,
            "torch": torch.__version__,
            "versions": {_name(each): each.version for each in importlib.metadata.distributions()},
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, gloo",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": _commit(),
            "outcomes": self.outcomes,
            "reasons": self.reasons,
        }
        write_json(self.directory / f"{version}.json", record)


def _name(distribution: importlib.metadata.Distribution) -> str:
    return re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()


def _commit() -> str:
    """The checkout's commit, marked when files differ from it; "" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return answer.stdout.strip()
