"""Dry runs of the recipes: Megatron takes the flags, and the ranks' parameters add up to one model."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from megatron_dyt.cli import main
from megatron_dyt.errors import UserError
from megatron_dyt.recipes import dry_run, load, memory
from megatron_dyt.recipes.layout import Cluster, Layout
from megatron_dyt.recipes.plan import Speeds, ranked

RUN = ["--bf16", "--tokenizer-type", "NullTokenizer", "--vocab-size", "31999"]


pytestmark = pytest.mark.usefixtures("forget")


@pytest.fixture
def forget() -> Iterator[None]:
    """Afterwards Megatron has no arguments, and no replacements for a CPU."""
    yield
    from megatron.training import global_vars

    from megatron_dyt import cpu

    global_vars._GLOBAL_ARGS = None
    cpu.disable()


@pytest.mark.parametrize(("name", "nodes"), [("7b", 64), ("13b", 64), ("34b", 128), ("70b", 128)])
def test_the_papers_sizes(name: str, nodes: int) -> None:
    recipe = load(name)
    layout = ranked(recipe, Cluster(nodes, 8, 80e9), Speeds())[0].layout
    args, stages = dry_run.simulate([*recipe.flags(), *layout.flags(), *RUN], 8 * nodes, recipe.vocab_size)
    assert args.padded_vocab_size == recipe.padded_vocab_size(layout.tp)
    assert [stage.parameters for stage in stages] == [
        memory.stage_parameters(recipe, layout, stage) for stage in range(layout.pp)
    ]
    padding = 2 * (args.padded_vocab_size - recipe.vocab_size) * recipe.hidden_size
    norms = (2 * recipe.num_layers + 1) * (recipe.hidden_size + 1)
    total = sum(layout.tp * stage.split + stage.replicated for stage in stages)
    assert total == recipe.parameters_without_norms + padding + norms + 1
    assert total == memory.model_parameters(recipe, layout)
    assert sum(stage.norms for stage in stages) == 2 * recipe.num_layers + 1


def test_the_rmsnorm_twin_has_no_alpha() -> None:
    recipe = load("125m")
    flags = [*recipe.flags("RMSNorm"), *RUN, "--micro-batch-size", "8"]
    _args, (stage,) = dry_run.simulate(flags, 8, recipe.vocab_size)
    norms = (2 * recipe.num_layers + 1) * recipe.hidden_size
    assert stage.parameters == recipe.parameters_without_norms + norms + 1  # its embedding scale


def test_a_rank_holds_its_own_experts_alone() -> None:
    recipe = load("125m")
    experts = "--num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall"
    experts += " --expert-tensor-parallel-size 1 --tensor-model-parallel-size 2 --sequence-parallel"
    flags = [*recipe.flags(), *RUN, "--micro-batch-size", "8", *experts.split()]
    found = {}
    for ranks in (1, 4):
        split = [*flags, "--expert-model-parallel-size", str(ranks)]
        args, (stage,) = dry_run.simulate(split, 8, recipe.vocab_size)
        assert (
            stage.experts * ranks == 8 * recipe.num_layers * 3 * recipe.hidden_size * recipe.ffn_hidden_size
        )
        found[ranks] = dry_run.whole(args, [stage])
    assert found[1] == found[4]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tensor-model-parallel-size", "3"],
            "--tensor-model-parallel-size 3 does not divide --ffn-hidden",
        ),
        (
            ["--num-dataset-builder-threads", "0"],
            r"the flags: .*`assert args.*`.*--num-dataset-builder-threads 0",
        ),
        (["--no-such-flag"], "parser refuses the flags: .*--no-such-flag"),
        (["--dyt-alpha-init-attn", "0"], "--dyt-alpha-init-attn is 0"),
        (["--padded-vocab-size", "31872"], "is 31872, and the tokenizer has 32000 entries.* at least 32000"),
    ],
)
def test_what_megatron_refuses_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dry_run.simulate([*load("125m").flags(), *RUN, "--micro-batch-size", "1", *flags], 8, 32000)


@pytest.mark.parametrize(("more", "stays"), [([], False), (["--use-persistent-ckpt-worker"], True)])
def test_what_megatron_switches_off_is_said(
    more: list[str], stays: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = ["--ckpt-format", "torch_dist", "--async-save", *more]
    flags = [*load("125m").flags(), *RUN, "--micro-batch-size", "1", *saving]
    args, _stages = dry_run.simulate(flags, 8, 32000)
    assert args.async_save == stays
    assert ("Megatron warns: --async-save is not supported" in capsys.readouterr().out) != stays


GPU_DEFAULTS = [*load("125m").flags(), *RUN, "--micro-batch-size", "1"]


def test_what_the_cluster_needs_and_this_machine_lacks_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither apex nor Transformer Engine is here, and the CPU runtime does without."""
    args, _stages = dry_run.simulate(GPU_DEFAULTS, 8, 32000)
    assert not args.gradient_accumulation_fusion
    assert "needed on the cluster: gradient accumulation fusion" in capsys.readouterr().out
    without = "--no-gradient-accumulation-fusion --no-rope-fusion --no-masked-softmax-fusion"
    dry_run.simulate([*GPU_DEFAULTS, *without.split(), "--transformer-impl", "local"], 8, 32000)
    assert "needed on the cluster" not in capsys.readouterr().out


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from megatron_dyt import cpu

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    yield
    cpu.disable()  # Puts back what it found.


def test_where_there_are_gpus_it_is_refused(gpus: None) -> None:
    with pytest.raises(UserError, match=r"cannot train on GPUs.*--no-gradient-accumulation-fusion"):
        dry_run.simulate(GPU_DEFAULTS, 8, 32000)


@pytest.mark.parametrize("norm", ["DyT", "RMSNorm"])
def test_a_plan_can_be_tried_at_once(norm: str) -> None:
    command = ["plan", "--model", "125m", "--nodes", "2", "--dry-run", "--norm", norm]
    text = CliRunner().invoke(main, command, catch_exceptions=False).output
    assert text.index("layout: TP") < text.index("dry run: 16 ranks") < text.index("dry run: fine")


def test_another_model_than_the_recipes_is_refused() -> None:
    flags = [*load("125m").flags(), *RUN, "--micro-batch-size", "1", "--num-layers", "10"]
    layout = Layout(1, 1, 1, 8, 1)
    count = memory.model_parameters(load("125m"), layout)
    with pytest.raises(UserError, match=r"add up to [0-9,]+, and the recipe has [0-9,]+"):
        dry_run.run(flags, 8, 32000, parameters=count)


def test_the_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"t\.model is not a SentencePiece model"):
        dry_run.tokenizer_entries(str(tmp_path / "t.model"))


def test_files_are_looked_at_when_asked() -> None:
    flags = [*load("125m").flags(), *RUN, "--micro-batch-size", "1", "--train-data-path", "no/where"]
    flags += ["--valid-data-path", "no/where"]
    assert dry_run.run(flags, 8, 32000)[-1].startswith("dry run: fine")
    with pytest.raises(UserError, match=r"no/where\.idx does not exist"):
        dry_run.run(flags, 8, 32000, files=True)


def test_flags_are_needed() -> None:
    with pytest.raises(UserError, match="give Megatron's flags after `--`"):
        dry_run.run([], 8, 32000)
