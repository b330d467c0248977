"""Keys of the metadata; a newer torch's checkpoint is told from a damaged one by all that reads them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorProperties

from megatron_dyt.checkpoints import damage, iterations
from megatron_dyt.checkpoints.iterations import DamagedCheckpoint
from megatron_dyt.checkpoints.metadata import is_optimizer, read_metadata
from megatron_dyt.checkpoints.torch_dist import TorchDistReader
from megatron_dyt.errors import UserError


def test_entries_of_the_optimizer() -> None:
    assert is_optimizer("optimizer.state.exp_avg.decoder.x")
    assert is_optimizer("chained_0.optimizer.state.x")
    assert not is_optimizer("decoder.final_layernorm.alpha")


@pytest.fixture
def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose tensors have one property more than this torch knows, as 2.15's have for 2.14."""
    known = TensorProperties.__getstate__
    with monkeypatch.context() as patch:
        patch.setattr(TensorProperties, "__getstate__", lambda self: (*known(self), None))
        dcp.save({"weight": torch.arange(4.0)}, checkpoint_id=tmp_path / "c", no_dist=True)
    (tmp_path / "c/metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return tmp_path / "c"


@pytest.mark.parametrize("read", [read_metadata, iterations.check_files, TorchDistReader])
def test_a_newer_torch_s_checkpoint_is_not_called_damaged(
    newer: Path, read: Callable[[Path], object]
) -> None:
    with pytest.raises(UserError, match=r"saved with a newer torch than this \d.* Load it with") as caught:
        read(newer)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_no_run_goes_back_before_it(newer: Path) -> None:
    # --dyt-load-fallback passes over a DamagedCheckpoint, and sets it aside.
    with pytest.raises(UserError, match="saved with a newer torch") as caught:
        damage.verify(newer, {"weight"})
    assert not isinstance(caught.value, DamagedCheckpoint)
