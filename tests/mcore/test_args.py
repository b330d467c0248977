import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dyt.config import MODEL_ARGS, DyTConfig
from megatron_dyt.errors import UserError
from megatron_dyt.mcore import args as args_module
from megatron_dyt.mcore.model_config import initial_embedding_scale

Make = Callable[..., Any]

REQUIRED = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --max-position-embeddings 32"


@pytest.fixture
def parse(training_loop: None, world: None) -> Callable[..., argparse.Namespace]:
    """Megatron's own parser with the plugin's flags, then the plugin's validation."""
    from megatron.training.arguments import add_megatron_arguments

    def run(flags: str, validate: bool = True) -> argparse.Namespace:
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        args = parser.parse_args(f"{REQUIRED} {flags}".split())
        if validate:
            args_module.validate(args)
        return args

    return run


def test_dyt_is_a_norm_and_others_stay(parse: Make) -> None:
    assert parse("--normalization DyT").normalization == "DyT"
    assert parse("--normalization RMSNorm").normalization == "RMSNorm"


def test_an_unknown_norm_is_refused_with_the_choices(parse: Make, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse("--normalization DTY")
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert "invalid choice: 'DTY'" in message
    assert "DyT" in message.split("choose from")[1]


def test_auto_is_the_default(parse: Make) -> None:
    args = parse("--normalization DyT")
    assert (args.dyt_preset, args.dyt_log_alpha, args.dyt_alpha_in_grad_norm) == ("auto", True, False)
    assert args.dyt_fuse_residual is True
    assert (args.dyt_alpha_init_attn, args.dyt_alpha_init_ffn, args.dyt_alpha_init_final) == (0.5, 1.0, 0.5)


def test_the_paper_is_resolved_to_numbers(parse: Make) -> None:
    args = parse("--normalization DyT --dyt-preset paper")
    assert (args.dyt_alpha_init_attn, args.dyt_alpha_init_ffn) == (1.0, 1.0)
    assert (args.dyt_alpha_init_final, args.dyt_alpha_init_qk) == (1.0, 1.0)
    assert (args.dyt_bias, args.dyt_function, args.dyt_backend) == (False, "tanh", "auto")
    assert args.dyt_embedding_scale == "sqrt"
    assert args.init_method_std == 0.02
    assert type(args.init_method_std) is float


def test_unit_sets_the_linear_layers_std_and_keeps_the_embeddings(parse: Make) -> None:
    args = parse("--normalization DyT --dyt-preset unit")
    assert args.init_method_std == pytest.approx(1 / 8)
    assert args.embedding_init_method_std == 0.02
    assert type(args.embedding_init_method_std) is float


def test_unit_leaves_what_the_user_gave(parse: Make) -> None:
    args = parse("--normalization DyT --dyt-preset unit --init-method-std 0.02")
    assert args.init_method_std == 0.02
    assert args.embedding_init_method_std is None
    args = parse("--normalization DyT --dyt-preset unit --embedding-init-method-std 0.5")
    assert (args.init_method_std, args.embedding_init_method_std) == (pytest.approx(1 / 8), 0.5)


def test_flags_override_the_preset(parse: Make) -> None:
    args = parse(
        "--normalization DyT --dyt-preset unit --dyt-alpha-init-attn 0.7 --dyt-alpha-init-qk 2 "
        "--qk-layernorm --dyt-bias --dyt-embedding-scale 3 --dyt-function erf --dyt-backend torch "
        "--no-dyt-fuse-residual"
    )
    config = DyTConfig.from_args(args)
    assert config == DyTConfig.unit(
        64,
        alpha_attn=0.7,
        alpha_qk=2.0,
        bias=True,
        embedding_scale=3.0,
        function="erf",
        backend="torch",
        fuse_residual=False,
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--dyt-preset unit",
        "--dyt-alpha-init-attn 0.5",
        "--dyt-alpha-init-ffn 0.5",
        "--dyt-alpha-init-final 0.5",
        "--dyt-alpha-init-qk 0.5",
        "--dyt-bias",
        "--no-dyt-bias",
        "--dyt-embedding-scale sqrt",
        "--dyt-function tanh",
        "--dyt-weight-init unit",
        "--dyt-backend auto",
        "--dyt-fuse-residual",
        "--no-dyt-fuse-residual",
        "--dyt-stats-interval 5 --save x",
    ],
)
@pytest.mark.parametrize("norm", ["", "--normalization RMSNorm"])
def test_dyt_flags_need_dyt(parse: Make, flags: str, norm: str) -> None:
    flag = flags.split()[0].replace("--no-dyt", "--dyt")
    with pytest.raises(UserError, match=f"{flag} given with --normalization .*need --normalization DyT"):
        parse(f"{norm} {flags}")


def test_the_embedding_scale_of_other_norms(parse: Make) -> None:
    assert parse("--normalization RMSNorm --embedding-scale unit").embedding_scale == "unit"
    assert parse("--normalization RMSNorm --embedding-scale 2").embedding_scale == 2.0
    assert parse("--normalization RMSNorm").embedding_scale is None


def test_the_scale_has_two_names(parse: Make) -> None:
    assert parse("--normalization DyT --embedding-scale 2").dyt_embedding_scale == 2.0


BAD_ALPHA = r"--dyt-alpha-init-ffn is .*finite and > 0"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        *((f"DyT --dyt-alpha-init-ffn={value}", BAD_ALPHA) for value in ("0", "-1", "nan", "inf")),
        ("DyT --dyt-alpha-init-qk 2", "given without --qk-layernorm"),
        ("DyT --dyt-backend triton", r"--dyt-backend triton: .*use backend='auto' or 'torch'"),
        ("DyT --dyt-stats-interval 5", "--metrics-dir DIR or --tensorboard-dir DIR too"),
        ("DyT --save x --dyt-stats-interval -1", "is -1; give a number of steps"),
        ("DyT --embedding-scale 2 --dyt-embedding-scale 3", "are the same setting; give one of them"),
        ("RMSNorm --embedding-scale big", "sqrt, unit, none"),
        ("RMSNorm --embedding-scale unit --mtp-num-layers 1", "cannot be combined with --mtp-num-layers"),
    ],
)
def test_what_cannot_be_is_refused(parse: Make, flags: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(f"--normalization {flags}")


def test_a_missing_width_is_named(parse: Make) -> None:
    args = parse("--normalization DyT", validate=False)
    args.hidden_size = None
    with pytest.raises(UserError, match="--hidden-size is missing"):
        args_module.validate(args)


@pytest.mark.parametrize(("saved", "where"), [({}, "none"), ({"dyt_running_scale": True}, "all")])
def test_a_checkpoint_of_an_earlier_build_keeps_its_running_scale(saved: dict[str, Any], where: str) -> None:
    old = SimpleNamespace(normalization="DyT", dyt_preset="auto", **saved)
    args = SimpleNamespace(normalization="DyT")
    args_module.restore(args, old)
    assert args.dyt_running_scale == where
    args_module.restore(SimpleNamespace(normalization="DyT", dyt_running_scale=where), old)


def test_a_checkpoint_restores_every_model_setting(parse: Make) -> None:
    saved = parse("--normalization DyT --dyt-preset unit --dyt-alpha-init-ffn 0.3 --dyt-bias")
    args = parse("--normalization DyT --dyt-backend torch", validate=False)
    args_module.restore(args, saved)
    args_module.validate(args)
    for name in MODEL_ARGS:
        assert getattr(args, name) == getattr(saved, name), name
    assert args.dyt_backend == "torch"


def test_a_checkpoint_of_another_norm_clears_dyt_flags(parse: Make) -> None:
    args = parse("--normalization RMSNorm", validate=False)
    args_module.restore(args, SimpleNamespace(normalization="RMSNorm"))
    args_module.validate(args)
    assert args.dyt_preset is None


def test_a_dyt_checkpoint_without_its_settings_is_refused() -> None:
    with pytest.raises(UserError, match="checkpoint's dyt_preset is None"):
        args_module.restore(SimpleNamespace(normalization="DyT"), SimpleNamespace())


def test_load_args_wrapper_passes_a_failed_load_through() -> None:
    wrapped = args_module.wrap_load_args(lambda args: args)
    marker = argparse.Namespace(normalization="DyT")
    assert wrapped(marker) is marker


def test_a_parser_without_the_norm_flag_is_refused() -> None:
    wrapped = args_module.wrap_add_arguments(lambda parser: parser)
    with pytest.raises(UserError, match="has no --normalization"):
        wrapped(argparse.ArgumentParser())


def test_core_users_get_the_default_preset_or_their_own(make_config: Make) -> None:
    config = make_config(hidden_size=4096, num_attention_heads=32)
    assert config.dyt == DyTConfig.auto(4096)
    assert initial_embedding_scale(config) == pytest.approx(50.0)
    config.dyt = DyTConfig.paper(4096)
    config.__post_init__()
    assert config.dyt == DyTConfig.paper(4096)
    assert initial_embedding_scale(config) == 64.0


def test_flags_reach_the_model_config(
    parse: Make, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.training import global_vars

    args = parse("--normalization DyT --dyt-preset unit --dyt-alpha-init-attn 0.9")
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    assert make_config().dyt == DyTConfig.unit(32, alpha_attn=0.9, alpha_qk=1.0)


def test_stock_norms_get_nothing(make_config: Make) -> None:
    config = make_config("RMSNorm")
    assert not hasattr(config, "dyt")
    assert initial_embedding_scale(config) is None


def test_a_given_flag_that_contradicts_the_checkpoint_is_refused(parse: Make) -> None:
    saved = parse("--normalization DyT --dyt-preset unit --dyt-embedding-scale 2")
    same = parse("--normalization DyT --dyt-embedding-scale 2.0", validate=False)
    args_module.restore(same, saved)
    other = parse("--normalization DyT --dyt-bias", validate=False)
    with pytest.raises(
        UserError, match="--dyt-bias True was given, but the checkpoint was trained with False"
    ):
        args_module.restore(other, saved)


def test_dyt_asked_for_and_another_norm_in_the_checkpoint_is_refused(parse: Make) -> None:
    def load(args: argparse.Namespace) -> tuple[argparse.Namespace, SimpleNamespace]:
        args.normalization = "RMSNorm"
        return args, SimpleNamespace(normalization="RMSNorm")

    wrapped = args_module.wrap_load_args(load)
    with pytest.raises(UserError, match="--normalization DyT was given, but the checkpoint holds a RMSNorm"):
        wrapped(parse("--normalization DyT", validate=False))
    assert wrapped(parse("--normalization LayerNorm", validate=False))[0].normalization == "RMSNorm"


@pytest.mark.parametrize(("release", "refused"), [("0.16.1", True), ("0.17.1", False)])
def test_a_fallback_that_this_release_deletes_is_refused(
    parse: Make, monkeypatch: pytest.MonkeyPatch, release: str, refused: bool
) -> None:
    monkeypatch.setattr(args_module.compat, "megatron_version", lambda: release)
    flags = "--dyt-load-fallback --save-retain-interval 10"
    if not refused:
        parse(flags)
        return
    with pytest.raises(UserError, match=r"--save-retain-interval 10 needs Megatron 0\.17 .*Leave one"):
        parse(flags)
