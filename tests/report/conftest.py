from pathlib import Path

import pytest

from tests.report.made_up_runs import write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A directory with the runs `rmsnorm` and `dyt`."""
    write_run(tmp_path / "rmsnorm", final=2.5, ms=400, normalization="RMSNorm", bits=1.9, acc=0.25)
    write_run(tmp_path / "dyt", final=2.375, ms=300, normalization="DyT")
    return tmp_path
