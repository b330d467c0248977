"""Flags as text in which numbers are computed: `--hidden-size 192 --init-method-std {1/sqrt(hidden_size)}`.

What stands in braces is arithmetic over numbers, axes of the grid, and other flags of the same run by their
names in Python. It is parsed, not evaluated by Python.
"""

import ast
import math
import operator
import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from megatron_dyt.errors import UserError

Number = float | int
# A number, or text where an expression is one name alone: `--dyt-function {function}`.
Value = Number | str

_BRACES = re.compile(r"\{([^{}]*)\}")
_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: math.pow,
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "sqrt": math.sqrt,
    "log2": math.log2,
    "round": round,
    "ceil": math.ceil,
    "min": min,
    "max": max,
}
# As many digits as the quickstart writes its std with; more would only look exact.
_DIGITS = 6


def split(text: str) -> list[str]:
    """The words of `text` as a shell splits them; what stands in braces is one word, spaces and all."""
    try:
        return shlex.split(_BRACES.sub(lambda found: "".join(found[0].split()), text))
    except ValueError as error:
        raise UserError(f"flags {text!r}: {error}; close the quotation mark") from error


def values(words: Sequence[str]) -> dict[str, str]:
    """{name in Python: first value} of each flag in `words`; of one given twice the last, as in argparse."""
    found: dict[str, str] = {}
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        if word.startswith("--"):
            name, has_value, value = word.removeprefix("--").partition("=")
            found[name.replace("-", "_")] = (
                value if has_value else "" if following.startswith("--") else following
            )
    return found


def fill(words: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """`words` with each expression in braces replaced by its value.

    Args:
        names: {name: value} of what an expression may use; a value may hold expressions itself.

    Raises:
        UserError: an expression that cannot be computed; it is quoted.
    """
    return [_fill(word, names, ()) for word in words]


def _fill(text: str, names: Mapping[str, str], inside: tuple[str, ...]) -> str:
    return _BRACES.sub(lambda found: _text(_evaluate(found[1], names, inside)), text)


def _text(value: Value) -> str:
    if isinstance(value, str):
        return value
    return str(int(value)) if float(value).is_integer() else f"{value:.{_DIGITS}g}"


def _evaluate(expression: str, names: Mapping[str, str], inside: tuple[str, ...]) -> Value:
    if expression in inside:
        raise UserError(f"{{{expression}}} uses itself, by way of {', '.join(inside[1:]) or 'its own flag'}")
    try:
        tree = ast.parse(expression, mode="eval").body
        if isinstance(tree, ast.Name):
            return _lookup(tree.id, expression, names, inside)
        value = _number(tree, expression, names, inside)
        if not math.isfinite(value):
            raise ValueError(f"the result is {value}")
        return value
    except UserError:
        raise
    except (SyntaxError, ValueError, TypeError, ArithmeticError) as error:
        raise UserError(
            f"{{{expression}}} cannot be computed: {error}; allowed: numbers, axes, flags of the run such as "
            f"hidden_size, + - * / // % **, {', '.join(_FUNCTIONS)}"
        ) from error


def _number(node: ast.expr, expression: str, names: Mapping[str, str], inside: tuple[str, ...]) -> Number:
    def number(part: ast.expr) -> Number:
        return _number(part, expression, names, inside)

    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.Name(id=name):
            return float(_lookup(name, expression, names, inside))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -number(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](number(left), number(right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*map(number, args))
    raise ValueError(f"{ast.unparse(node)} is none of what is allowed")


def _lookup(name: str, expression: str, names: Mapping[str, str], inside: tuple[str, ...]) -> str:
    if not names.get(name):
        raise UserError(
            f"{{{expression}}}: {name} is neither an axis of this run nor a flag of it that has a value"
        )
    return _fill(names[name], names, (*inside, expression))
