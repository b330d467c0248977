import logging

import pytest
import torch

from megatron_dyt.mcore import ranks

_log = logging.getLogger("megatron_dyt.test")


@pytest.mark.usefixtures("nothing_logged")
def test_a_line_comes_once_and_from_one_rank_per_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        ranks.log_once(_log, "line")
    assert capsys.readouterr().out == "megatron_dyt: line\n"
    # The first rank of another stage.
    monkeypatch.setenv("RANK", "4")
    ranks.log_once(_log, "of the last stage")
    assert capsys.readouterr().out == "megatron_dyt [rank 4]: of the last stage\n"
    monkeypatch.setattr(ranks, "is_first_of_stage", lambda: False)
    ranks.log_once(_log, "another")
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("world")
def test_the_first_rank_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    assert ranks.is_first_of_stage()
    with monkeypatch.context() as another_rank:
        another_rank.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: 1)
        assert not ranks.is_first_of_stage()
    # Users of process groups of their own may not have initialized Megatron's.
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: False)
    assert ranks.is_first_of_stage()
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert not ranks.is_first_of_stage()
