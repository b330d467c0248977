"""What a DyT model is made of: alpha by role, bias, embedding scale, function; and the presets.

DyT does not rescale its input, so a run's success is decided by the scale it starts at. A preset fixes
that scale:

- `paper`: alpha by width as tuned in arXiv 2503.10622 (Tables 10 and 11) for linear layers of std 0.02,
  with the embedding scale sqrt(hidden). Meant for widths of 1024 and above.
- `unit`: unit variance everywhere, at any width: embedding scale 1/std of the embedding, linear layers
  of std 1/sqrt(hidden), alpha 0.5 in front of attention and 0.25 elsewhere, and the weight (gamma) with
  which DyT hands a unit-variance input on at unit variance.
- `auto`, the default: `unit` with alpha 0.5, in front of the MLP 1 over a running scale, learned by its
  logarithm, and without alpha's share of the gradient norm.

`SETTINGS` is the one table of what a user can set. Megatron's flags, the names in its args and checkpoints,
and the fields of configs made in code (`DyTFields`) are all made from it.
"""

# ruff: noqa: RUF009 (`_setting` returns a `dataclasses.field`)
import math
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from megatron_dyt.errors import UserError

# Value of `--normalization` and of `TransformerConfig.normalization`.
NORMALIZATION = "DyT"

# The closed sets of names that flags, configs and modules share.
# Role: where a norm stands: in front of attention, in front of the MLP or MoE, after the last layer,
# or on queries and keys.
Role = Literal["attn", "ffn", "final", "qk"]
Preset = Literal["paper", "unit", "auto"]
DEFAULT_PRESET: Preset = "auto"
Function = Literal[
    "tanh", "erf", "hardtanh", "sigmoid", "isru", "arctan", "satursin", "arcsinhclip", "identity"
]
WeightInit = Literal["one", "unit"]
# Where alpha is divided by a running average of the input's rms.
RunningScale = Literal["none", "mlp", "all"]
Backend = Literal["auto", "triton", "torch"]
# What happens when an update makes an alpha <= 0.
OnBadAlpha = Literal["stop", "report"]

# arXiv 2503.10622, Tables 10 and 11: width -> (alpha0 in front of attention, alpha0 elsewhere).
# 5120 is the 13B row of Table 10; Table 11 shows that depth does not matter.
PAPER_ALPHA: dict[int, tuple[float, float]] = {
    1024: (1.0, 1.0),
    2048: (1.0, 0.5),
    4096: (0.8, 0.2),
    5120: (0.6, 0.15),
    8192: (0.2, 0.05),
}
# In front of attention, in front of the MLP or MoE, after the last layer.
UNIT_ALPHA = (0.5, 0.25, 0.25)
# DyT hands on at most gamma: 4.2 for alpha 0.25, 2.4 for 0.5 and 1.6 for 1 (output of unit variance).
# A gated MLP squares it: 17, 6 and 2.5. With 0.25 the stream can run away within the first steps.
AUTO_ALPHA = (0.5, 1.0, 0.5)
# Of a learned logarithm, alpha = exp(rate * log_alpha). Adam moves a parameter by about the learning rate per
# step, alpha therefore by `rate` learning rates of itself. alpha has to fall as fast as the stream grows,
# tenfold within the first 50 steps of a small run: with 3 it saturates there with some seeds
# (docs/initial-scale.md).
LOG_ALPHA_RATE = 10.0
# Where all sites have a running scale it is not alpha that follows the stream.
SLOW_LOG_ALPHA_RATE = 2.0
# Of its start, what a logarithm leaves of an alpha over the running scale of MLPs alone. Without a floor the
# fast logarithm follows any small gradient for as long as that has one sign, and the MLP falls silent.
ALPHA_FLOOR = 0.15
# The paper has no DyT on queries and keys. They leave a linear layer with about the scale of its
# input, DyT's output, so alpha 1 puts them inside tanh's curved range under both presets.
QK_ALPHA = 1.0

EMBEDDING_SCALE_RULES = ("sqrt", "unit", "none")


def paper_alpha(hidden_size: int) -> tuple[float, float]:
    """(attention alpha0, other alpha0) for a width: the paper's points kept exact.

    Between two points alpha0 is a power law of the width (straight in log-log); outside them it is
    clamped to the nearest point.
    """
    widths = sorted(PAPER_ALPHA)
    width = min(max(hidden_size, widths[0]), widths[-1])
    if width in PAPER_ALPHA:
        return PAPER_ALPHA[width]
    low = max(w for w in widths if w < width)
    high = min(w for w in widths if w > width)
    t = math.log(width / low) / math.log(high / low)
    attn, other = (a * (b / a) ** t for a, b in zip(PAPER_ALPHA[low], PAPER_ALPHA[high], strict=True))
    return attn, other


@dataclass(frozen=True)
class Setting:
    """How one setting is given: a flag of Megatron's command line, and a name in its args and in configs.

    Attributes:
        arg: name in Megatron's args, which every checkpoint holds, and in `DyTFields`; with dashes the flag.
        help: of the flag.
        kind: type of a value: a Literal, bool, int, float, or a union, which is given as text.
        field: the field of `DyTConfig` that it sets; "" for what concerns the training loop alone.
        metavar: stands for the value in --help.
        default: of the flag; None, for "not given", where a preset or `DyTConfig` has the default.
        of_model: the model's parameters depend on it: --use-checkpoint-args restores it.
        needs_dyt: it is refused with another --normalization.
    """

    arg: str
    help: str
    kind: Any = None
    field: str = ""
    metavar: str | None = None
    default: bool | int | str | None = None
    of_model: bool = False
    needs_dyt: bool = True

    @property
    def flag(self) -> str:
        """The flag, as "--dyt-bias"."""
        return "--" + self.arg.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values of a closed set; empty for another kind."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()


def _setting(
    arg: str, help: str, *, default: Any = MISSING, metavar: str | None = None, of_model: bool = True
) -> Any:
    """A field of `DyTConfig`, and how it is given. Its `Setting` takes the kind from the field's type."""
    setting = Setting(arg, help, metavar=metavar, of_model=of_model)
    return field(default=default, metadata={"setting": setting})


_SCALE = "{sqrt,unit,none,FLOAT}"


@dataclass(frozen=True, kw_only=True)
class DyTConfig:
    """A model's DyT settings. Build one with `paper`, `unit` or `preset`, and override by keyword:

        DyTConfig.paper(4096)
        DyTConfig.unit(512, alpha_ffn=0.3, bias=True)

    Raises:
        UserError: a value outside what is allowed.
    """

    name: Preset = _setting(
        "dyt_preset",
        "Where alpha and the embedding scale start: 'paper' by width (arXiv 2503.10622), "
        "'unit' for unit variance at any width (also sets --init-method-std to "
        "1/sqrt(hidden) and --embedding-init-method-std to what --init-method-std was, unless given), "
        "'auto' (default) for unit with a larger alpha, learned by its logarithm, with a running scale and "
        "left out of the gradient norm.",
        # As the other defaults here, which are the paper's.
        default="paper",
    )
    """The preset that the other values come from; "unit" and "auto" also want linear layers of
    `linear_init_std`."""

    alpha_attn: float = _setting(
        "dyt_alpha_init_attn", "Initial alpha of DyT in front of attention. Default: preset."
    )
    """Initial alpha in front of attention: finite, > 0, per unit of x. 0.2 to 1.0 in the paper (Table 10)."""

    alpha_ffn: float = _setting(
        "dyt_alpha_init_ffn", "Initial alpha of DyT in front of the MLP or MoE. Default: preset."
    )
    """Initial alpha in front of the MLP or MoE: finite, > 0. 0.05 to 1.0 in the paper ("other", Table 10)."""

    alpha_final: float = _setting("dyt_alpha_init_final", "Initial alpha of the final DyT. Default: preset.")
    """Initial alpha after the last layer: finite, > 0. In the paper that of `alpha_ffn` (Table 10)."""

    alpha_qk: float = _setting(
        "dyt_alpha_init_qk",
        "Initial alpha of DyT on queries and keys (--qk-layernorm). Default: preset.",
        default=QK_ALPHA,
    )
    """Initial alpha on queries and keys: finite, > 0. The paper has no DyT there (`QK_ALPHA`)."""

    bias: bool = _setting(
        "dyt_bias",
        "Give every DyT a bias (beta). Default: no, as RMSNorm and the paper's LLaMA code; yes for sigmoid "
        "with --dyt-weight-init unit (the preset unit), which it centers.",
        default=False,
    )
    """Whether DyT has a bias (beta). RMSNorm has none, and neither has the paper's LLaMA code."""

    embedding_scale: str | float = _setting(
        "dyt_embedding_scale",
        "Initial value of the learnable scalar on the embedding: sqrt(hidden), 1/std of the "
        "embedding, no scalar, or a number. Default: preset.",
        metavar=_SCALE,
        default="sqrt",
    )
    """Initial value of the learnable scalar on the embedding: "sqrt" (sqrt(hidden), the paper's, section 6),
    "unit" (1 / the embedding's initial std), "none", or a finite number > 0."""

    function: Function = _setting(
        "dyt_function",
        "What bounds alpha * x. Default: tanh. erf is Derf (arXiv 2512.10938).",
        default="tanh",
    )
    """What bounds alpha * x; "tanh" is DyT, "erf" is Derf (arXiv 2512.10938) and has a learnable shift."""

    weight_init: WeightInit = _setting(
        "dyt_weight_init",
        "Initial weight (gamma): one, or unit for an output of unit variance. Default: preset.",
        default="one",
    )
    """Initial weight (gamma): "one" (the paper's), or "unit": the weight with which DyT hands on a
    unit-variance input at unit variance, as RMSNorm does (`unit_response`). A sigmoid's bias then starts
    where the mean is 0."""

    log_alpha: bool = _setting(
        "dyt_log_alpha",
        "Learn the logarithm of alpha instead of alpha, which then stays above 0 and changes by a share of "
        "itself per step. Default: preset.",
        default=False,
    )
    """Whether the parameter is `log_alpha`, and alpha = exp(`log_alpha_rate` * log_alpha) +
    `alpha_floor`."""

    running_scale: RunningScale = _setting(
        "dyt_running_scale",
        "Divide alpha by a running average of the rms of DyT's input, of past steps: in front of the MLP or "
        "MoE, everywhere, or not at all. Default: preset.",
        default="none",
    )
    """Where alpha is divided by a running average of the rms of its input (`mcore.running_scale`), a state of
    the model and no parameter: "mlp", in front of the MLP or MoE; "all", everywhere; or "none". alpha is then
    per unit of that rms."""

    freeze_alpha: bool = _setting(
        "dyt_freeze_alpha",
        "Leave every alpha at its initial value. With --dyt-alpha-init-* 1 that is the paper's DyT without "
        "alpha (Table 8). Default: no.",
        default=False,
    )
    """Whether alpha is a constant: without gradient and optimizer state, and saved like a learned one. With
    initial alphas of 1 it is the paper's ablation "without alpha" (Table 8)."""

    alpha_in_grad_norm: bool = _setting(
        "dyt_alpha_in_grad_norm",
        "Count the gradients of the alphas in the gradient norm that --clip-grad limits. Default: preset.",
        of_model=False,
        default=True,
    )
    """Whether the gradients of the alphas count in the gradient norm. An alpha's gradient is a sum over all
    elements of its site, and outweighs those of all weights together (docs/initial-scale.md)."""

    backend: Backend = _setting(
        "dyt_backend", "Kernel to use. Default: auto.", of_model=False, default="auto"
    )
    """Which kernels compute DyT; "auto" is Triton on GPUs and C on CPUs (docs/kernels.md)."""

    fuse_residual: bool = _setting(
        "dyt_fuse_residual",
        "DyT, the residual add in front of it and the sum of their gradients in one kernel each, where "
        "the model allows it (it says so where not). Default: yes.",
        of_model=False,
        default=True,
    )
    """DyT and the residual stream in one kernel, forward and backward, where the model allows it."""

    def __post_init__(self) -> None:
        for setting in SETTINGS:
            if setting.field and setting.needs_dyt:
                value = getattr(self, setting.field)
                if setting.choices:
                    check_choice(setting.flag, value, setting.choices)
                elif setting.kind is float:
                    check_alpha(setting.flag, value)
        parse_embedding_scale(self.embedding_scale)

    @classmethod
    def paper(cls, hidden_size: int, **overrides: Any) -> Self:
        """The paper's LLaMA settings for a width (`paper_alpha`), embedding scale sqrt(hidden)."""
        attn, other = paper_alpha(hidden_size)
        return cls._build("paper", (attn, other, other), overrides)

    @classmethod
    def unit(cls, hidden_size: int, **overrides: Any) -> Self:
        """Unit variance everywhere at the start: embedding scale 1/std, alpha 0.5 / 0.25 whatever
        the width, and the weight that gives DyT's output unit variance.

        Goes with linear layers of std 1/sqrt(hidden_size): see `linear_init_std`.
        """
        scale = {"embedding_scale": "unit", "weight_init": "unit"}
        return cls._build("unit", UNIT_ALPHA, scale | overrides)

    @classmethod
    def auto(cls, hidden_size: int, **overrides: Any) -> Self:
        """`unit` with larger alphas (`AUTO_ALPHA`), learned by their logarithm, so that a step changes them
        by a share of themselves, in front of the MLP over a running scale, and with their gradients left out
        of the gradient norm, so that they do not clip all others."""
        settings: dict[str, Any] = {"embedding_scale": "unit", "weight_init": "unit"}
        settings |= {"log_alpha": True, "alpha_in_grad_norm": False}
        # A frozen alpha is a constant.
        settings["running_scale"] = "none" if overrides.get("freeze_alpha") else "mlp"
        return cls._build("auto", AUTO_ALPHA, settings | overrides)

    @classmethod
    def preset(cls, name: str, hidden_size: int, **overrides: Any) -> Self:
        """The preset called `name`. Raises UserError when there is none of that name."""
        check_choice("--dyt-preset", name, get_args(Preset))
        build = {"paper": cls.paper, "unit": cls.unit, "auto": cls.auto}[name]
        return build(hidden_size, **overrides)

    @classmethod
    def from_args(cls, args: object, *, of_model: bool = False) -> Self:
        """The settings in Megatron's args, or in a config with the same names; the preset's where None.

        Args:
            args: has `hidden_size`, and settings under the names of `SETTINGS`; a name that is absent was
                not given.
            of_model: take only what the model's parameters depend on, for the args of a checkpoint: how
                its run computed may be unknown to this version.

        Raises:
            UserError: no width, or a value outside what is allowed.
        """
        hidden_size = getattr(args, "hidden_size", None)
        if hidden_size is None:
            raise UserError(
                f"--hidden-size is missing: alpha0 of --normalization {NORMALIZATION} depends on it."
            )
        given: dict[str, Any] = {}
        for setting in SETTINGS:
            value = getattr(args, setting.arg, None)
            if of_model and setting.arg == "dyt_running_scale":
                value = saved_running_scale(value)
            if setting.field and value is not None and (setting.of_model or not of_model):
                given.setdefault(setting.field, value)
        return cls.preset(given.pop("name", DEFAULT_PRESET), hidden_size, **given)

    def to_args(self) -> dict[str, str | float | bool]:
        """All settings by their names in Megatron's args."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["embedding_scale"] = parse_embedding_scale(self.embedding_scale)
        return {setting.arg: values[setting.field] for setting in SETTINGS if setting.field}

    @classmethod
    def _build(cls, name: Preset, alphas: tuple[float, float, float], settings: dict[str, Any]) -> Self:
        unknown = set(settings) - {each.name for each in fields(cls)}
        if unknown:
            raise UserError(
                f"DyTConfig has no field {sorted(unknown)}; it has {[f.name for f in fields(cls)]}."
            )
        alpha = dict(zip(("alpha_attn", "alpha_ffn", "alpha_final"), alphas, strict=True))
        # Only a bias takes away the sigmoid's mean. Not 2 sigmoid(z) - 1: that is tanh(z / 2), DyT once more.
        centers = settings.get("function") == "sigmoid" and settings.get("weight_init") == "unit"
        preset: dict[str, Any] = {"name": name, "bias": centers, **alpha}
        return cls(**(preset | settings))

    def alpha(self, role: str) -> float:
        """Initial alpha of a norm with this role."""
        value: float = getattr(self, f"alpha_{role}")
        return value

    def has_running_scale(self, role: str) -> bool:
        """Whether alpha of a norm with this role is divided by a running average."""
        return self.running_scale == "all" or (self.running_scale == "mlp" and role == "ffn")

    @property
    def log_alpha_rate(self) -> float:
        """By how many of its own steps a learned logarithm moves that of alpha."""
        return SLOW_LOG_ALPHA_RATE if self.running_scale == "all" else LOG_ALPHA_RATE

    def alpha_floor(self, role: str) -> float:
        """What alpha of a norm with this role stays above, where its logarithm is learned; 0 for no floor."""
        has_floor = self.log_alpha and self.running_scale == "mlp" and role == "ffn"
        return ALPHA_FLOOR * self.alpha(role) if has_floor else 0.0

    def initial_weight(self, role: str) -> float:
        """Initial weight (gamma) of a norm with this role."""
        if self.weight_init == "one":
            return 1.0
        mean, std = unit_response(self.function, self.alpha(role))
        # Without a bias a mean stays, and it is the rms that is 1.
        return 1.0 / (std if self.bias else math.hypot(mean, std))

    def initial_bias(self, role: str) -> float:
        """Initial bias (beta) of a norm with this role: what gives a centered input mean 0 again."""
        if self.weight_init == "one" or not self.bias:
            return 0.0
        return -self.initial_weight(role) * unit_response(self.function, self.alpha(role))[0]

    def linear_init_std(self, hidden_size: int) -> float | None:
        """Std that the preset wants for linear layers, or None where Megatron's own is right."""
        return None if self.name == "paper" else hidden_size**-0.5


_KINDS = get_type_hints(DyTConfig)
SETTINGS = (
    *(replace(f.metadata["setting"], field=f.name, kind=_KINDS[f.name]) for f in fields(DyTConfig)),
    Setting(
        "embedding_scale",
        "The same scalar for a LayerNorm or RMSNorm model: a baseline with the same start as DyT.",
        str | float,
        field="embedding_scale",
        metavar=_SCALE,
        of_model=True,
        needs_dyt=False,
    ),
    # Of the training loop, which a model made in code does not have.
    Setting(
        "dyt_on_bad_alpha",
        "When an update makes an alpha <= 0: stop (default), or report it and go on. One that is not "
        "finite always stops.",
        OnBadAlpha,
    ),
    Setting(
        "dyt_stats_interval",
        "Every N steps append alpha, std of the input and saturation of each DyT to "
        "dyt_stats.jsonl in the --save directory, without one in that of --metrics-dir. Default: 0, off.",
        int,
        metavar="N",
        default=0,
    ),
    Setting(
        "dyt_verify_load",
        "Before a checkpoint is loaded, compare what is read with the checksums in it; each rank reads "
        "a part. Default: yes, for every norm.",
        bool,
        default=True,
        needs_dyt=False,
    ),
    Setting(
        "dyt_load_fallback",
        "If the checkpoint to load is damaged, say so and load the complete one before it; in the "
        "--save directory the damaged one is renamed. --save-retain-interval then keeps the last two. "
        "Default: stop. For every norm.",
        bool,
        default=False,
        needs_dyt=False,
    ),
)

# What a checkpoint's args bring along with --use-checkpoint-args.
MODEL_ARGS = tuple(setting.arg for setting in SETTINGS if setting.of_model)


def _settings_as_fields[T](cls: type[T]) -> type[T]:
    """Make `cls` a dataclass with a field per setting of a model, None by default."""
    for setting in SETTINGS:
        if setting.field:
            cls.__annotations__[setting.arg] = (str if setting.choices else setting.kind) | None
            setattr(cls, setting.arg, None)
    return dataclass(cls)


@_settings_as_fields
class DyTFields:
    """Mix-in for a dataclass derived from Megatron's `TransformerConfig`; list it first among the bases.

        @dataclass
        class DyTTransformerConfig(DyTFields, TransformerConfig): ...

    For configs that are written in Python and not parsed: one that is copied by `dataclasses.replace`, or
    saved as YAML (Megatron Bridge), keeps fields alone.

    Its fields are the model's settings (`SETTINGS`), as their flags, with the same names: None takes the
    preset's value, which is looked up again whenever `__post_init__` runs, so that a changed `hidden_size`
    changes alpha. With another `normalization` only `embedding_scale` may be set. What cannot work raises
    UserError in `__post_init__`.

    The presets `unit` and `auto` also set `init_method_std` (and `embedding_init_method_std`, unless given),
    if it is still Megatron's default.
    """


def unit_response(function: str, alpha: float) -> tuple[float, float]:
    """Mean and standard deviation of f(alpha * z) for a standard normal z, by quadrature.

    The inverse of the second is the weight with which DyT hands on a unit-variance input at unit variance.
    The mean is exactly 0 for every function but the sigmoid.
    """
    # Here and not above: a recipe's table needs no torch, whose import takes seconds.
    import torch

    from megatron_dyt.ops.reference import dyt_forward

    # On the CPU also where a model is being built on another default device, such as meta.
    with torch.device("cpu"), torch.no_grad():
        z = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64)
        density = torch.exp(-0.5 * z * z)
        one = torch.ones(1, dtype=torch.float64)
        shift = torch.zeros_like(one) if function == "erf" else None
        y, mirrored = (
            dyt_forward(each[:, None], alpha * one, one, function=function, shift=shift)[:, 0]
            for each in (z, -z)
        )
        mean = ((y + mirrored) / 2 * density).sum() / density.sum()
        variance = ((y - mean).square() * density).sum() / density.sum()
        return float(mean), float(variance.sqrt())


def resolve_embedding_scale(rule: str | float, hidden_size: int, embedding_std: float) -> float | None:
    """Initial value of the embedding scale, or None for no scale.

    Args:
        rule: "sqrt", "unit", "none" or a positive number (also as text).
        hidden_size: width of the model.
        embedding_std: std that the embedding is initialised with (used by "unit").
    """
    parsed = parse_embedding_scale(rule)
    if parsed == "none":
        return None
    if parsed == "sqrt":
        return math.sqrt(hidden_size)
    if parsed == "unit":
        if embedding_std <= 0:
            raise UserError(
                f"--dyt-embedding-scale unit needs an embedding of positive initial std, got "
                f"{embedding_std}; give the scale as a number instead."
            )
        return 1.0 / embedding_std
    return float(parsed)


def parse_embedding_scale(given: str | float) -> str | float:
    """A rule's name or a positive finite number; raises UserError on anything else."""
    if given in EMBEDDING_SCALE_RULES:
        return given
    try:
        value = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(
            f"--dyt-embedding-scale is {given!r}; allowed: sqrt, unit, none or a finite number > 0."
        )
    return value


def saved_running_scale(value: str | bool | None) -> str:
    """A checkpoint's `dyt_running_scale`: absent, or a switch for all sites, in those of earlier builds."""
    return value if isinstance(value, str) else "all" if value else "none"


def check_alpha(flag: str, value: float) -> None:
    """Raises UserError unless `value` can start training: finite and > 0."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and value > 0):
        raise UserError(
            f"{flag} is {value}; alpha must start finite and > 0 (the paper uses 0.05 to 1.0). "
            "Leave the flag away to take the preset's value."
        )


def check_choice(flag: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises UserError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UserError(f"{flag} is {value!r}; allowed: {', '.join(allowed)}.")


def is_dyt(config: object) -> bool:
    """Whether Megatron's args or a TransformerConfig ask for DyT."""
    return getattr(config, "normalization", None) == NORMALIZATION
