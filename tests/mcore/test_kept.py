import pytest
import torch
from torch import nn

from megatron_dyt.mcore import kept


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_said", set())


class MambaMixer(nn.Module):
    pass


class OwnMixer(MambaMixer):
    pass


def test_what_stays_is_known_by_its_owner_and_slot() -> None:
    stays = kept.in_module(OwnMixer(), "norm")
    assert stays is not None
    assert stays.owner == "MambaMixer"
    assert kept.in_module(OwnMixer(), "other_norm") is None
    assert kept.in_module(nn.Linear(1, 1), "norm") is None
    assert kept.in_slot("GatedDeltaNetSubmodules", "out_norm") is not None
    assert kept.in_slot("GatedDeltaNetSubmodules", "in_proj") is None
    assert kept.in_slot("SelfAttentionSubmodules", "k_norm") is None


def test_what_stays_says_what_it_is_and_why_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        kept.tell(kept.KEPT[0])
    out = capsys.readouterr().out
    assert out.startswith(
        "DyT: the gated RMSNorm inside Mamba mixers (MambaMixer.norm) stays as it is: it is "
    )
    assert out.count("\n") == 1
    kept.tell(kept.KEPT[1])
    assert "Gated DeltaNet" in capsys.readouterr().out


def test_only_one_rank_of_a_stage_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kept, "_speaks", lambda: False)
    kept.say_once("line")
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("world")
def test_one_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    assert kept._speaks()
    with monkeypatch.context() as another_rank:
        another_rank.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 1)
        assert not kept._speaks()
    # Users of process groups of their own may not have initialized Megatron's.
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: False)
    assert kept._speaks()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert not kept._speaks()
