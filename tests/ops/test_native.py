"""Libraries of C kernels: only the one of this source is used."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_dyt.ops import cpu_dyt
from megatron_dyt.ops.native import open_library
from tests.ops.cases import needs_cpu_kernels


@needs_cpu_kernels
def test_a_library_of_another_source_is_not_used(tmp_path: Path) -> None:
    source, library, symbol = tmp_path / "kernels.c", tmp_path / "kernels.so", "dyt_source_crc32"
    shutil.copy(cpu_dyt.LIBRARY, library)
    assert open_library(source, symbol) is None  # no source
    shutil.copy(cpu_dyt.SOURCE, source)
    assert open_library(source, symbol) is not None
    assert open_library(source, "another_symbol") is None
    source.write_text("/* another version */\n")
    assert open_library(source, symbol) is None
    library.unlink()  # not written over: it is open
    library.write_bytes(b"no library")
    assert open_library(source, symbol) is None
