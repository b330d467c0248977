"""What a DyT model is made of: alpha by role, bias, embedding scale, function; and the two presets.

DyT does not rescale its input, so a run's success is decided by the scale it starts at. A preset fixes
that scale:

- `paper`: alpha by width as tuned in arXiv 2503.10622 (Tables 10 and 11) for linear layers of std 0.02,
  with the embedding scale sqrt(hidden). Meant for widths of 1024 and above.
- `unit`: unit variance everywhere, at any width: embedding scale 1/std of the embedding, linear layers
  of std 1/sqrt(hidden), alpha 0.5 in front of attention and 0.25 elsewhere, and the weight (gamma) with
  which DyT hands a unit-variance input on at unit variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from megatron_dyt.errors import UserError

# The closed sets of names that flags, configs and modules share.
# Role: where a norm stands: in front of attention, in front of the MLP or MoE, after the last layer,
# or on queries and keys.
Role = Literal["attn", "ffn", "final", "qk"]
Preset = Literal["paper", "unit"]
Function = Literal["tanh", "erf", "hardtanh", "sigmoid", "isru", "identity"]
WeightInit = Literal["one", "unit"]
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
UNIT_ALPHA = (0.5, 0.25)
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
class DyTConfig:
    """A model's DyT settings. Build one with `paper`, `unit` or `preset`, and override by keyword.

    Attributes:
        alpha_attn, alpha_ffn, alpha_final, alpha_qk: initial alpha by the norm's role, > 0.
        bias: whether DyT has a bias (beta). RMSNorm has none, and neither has the paper's LLaMA code.
        embedding_scale: "sqrt" (sqrt(hidden), the paper's), "unit" (1 / the embedding's initial std),
            "none", or a positive number: initial value of the learnable scalar on the embedding.
        weight_init: "one" (the paper's), or "unit": the weight with which DyT hands on a unit-variance
            input at unit variance, as RMSNorm does (`unit_response`).
        function: what bounds alpha * x; "tanh" is DyT, "erf" is Derf (arXiv 2512.10938).
        backend: "auto", "triton" or "torch".
        fuse_residual: DyT and the residual stream in one kernel, forward and backward, where the model
            allows it.
        name: the preset these values come from, for reports.

    Raises:
        UserError: a value outside what is allowed.
    """

    alpha_attn: float
    alpha_ffn: float
    alpha_final: float
    alpha_qk: float = QK_ALPHA
    bias: bool = False
    embedding_scale: str | float = "sqrt"
    function: Function = "tanh"
    weight_init: WeightInit = "one"
    backend: Backend = "auto"
    fuse_residual: bool = True
    name: Preset = "paper"

    def __post_init__(self) -> None:
        for role in get_args(Role):
            check_alpha(f"--dyt-alpha-init-{role}", self.alpha(role))
        check_choice("--dyt-function", self.function, get_args(Function))
        check_choice("--dyt-weight-init", self.weight_init, get_args(WeightInit))
        check_choice("--dyt-backend", self.backend, get_args(Backend))
        parse_embedding_scale(self.embedding_scale)

    @classmethod
    def paper(cls, hidden_size: int, **overrides: Any) -> Self:
        """The paper's LLaMA settings for a width (`paper_alpha`), embedding scale sqrt(hidden)."""
        attn, other = paper_alpha(hidden_size)
        return cls._build("paper", attn, other, overrides)

    @classmethod
    def unit(cls, hidden_size: int, **overrides: Any) -> Self:
        """Unit variance everywhere at the start: embedding scale 1/std, alpha 0.5 / 0.25 whatever
        the width, and the weight that gives DyT's output unit variance.

        Goes with linear layers of std 1/sqrt(hidden_size): see `linear_init_std`.
        """
        scale = {"embedding_scale": "unit", "weight_init": "unit"}
        return cls._build("unit", *UNIT_ALPHA, scale | overrides)

    @classmethod
    def preset(cls, name: str, hidden_size: int, **overrides: Any) -> Self:
        """The preset called `name`. Raises UserError when there is none of that name."""
        check_choice("--dyt-preset", name, get_args(Preset))
        return cls.unit(hidden_size, **overrides) if name == "unit" else cls.paper(hidden_size, **overrides)

    @classmethod
    def _build(cls, name: Preset, attn: float, other: float, settings: dict[str, Any]) -> Self:
        unknown = set(settings) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(
                f"DyTConfig has no field {sorted(unknown)}; it has {[f.name for f in fields(cls)]}."
            )
        alpha = {"alpha_attn": attn, "alpha_ffn": other, "alpha_final": other}
        return cls(**({"name": name} | alpha | settings))

    def alpha(self, role: str) -> float:
        """Initial alpha of a norm with this role."""
        value: float = getattr(self, f"alpha_{role}")
        return value

    def initial_weight(self, role: str) -> float:
        """Initial weight (gamma) of a norm with this role."""
        return 1.0 / unit_response(self.function, self.alpha(role)) if self.weight_init == "unit" else 1.0

    def linear_init_std(self, hidden_size: int) -> float | None:
        """Std that the preset wants for linear layers, or None where Megatron's own is right."""
        return hidden_size**-0.5 if self.name == "unit" else None


def unit_response(function: str, alpha: float) -> float:
    """Root mean square of f(alpha * z) for a standard normal z, by quadrature.

    Its inverse is the weight with which DyT hands on a unit-variance input at unit variance.
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
        response = dyt_forward(z[:, None], alpha * one, one, function=function, shift=shift)[:, 0]
        return float(((response.square() * density).sum() / density.sum()).sqrt())


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
