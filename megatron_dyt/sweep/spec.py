"""What a sweep file says, checked: the runs it stands for. docs/sweep.md describes the file."""

import itertools
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_dyt.errors import UserError
from megatron_dyt.sweep import flags

# What a file holds when its numbers are left as they are written: a label is 8e-3 and not 0.008.
type Yaml = str | list[Yaml] | dict[str, Yaml]

KEYS = ("title", "like", "prepare", "base", "grid", "seeds", "compare", "plots")
_COMPARE_KEYS = ("axis", "baseline", "best_over")
# In the names of runs, which are directories.
_LABEL = re.compile(r"[A-Za-z0-9.+-][A-Za-z0-9_.+-]*")
# Given by the sweep itself, which knows the run's directory and seed.
_OWN_FLAGS = ("seed", "data_seed", "metrics_dir", "save", "load", "save_interval", "data_cache_path")
# The longest name of a file on common file systems is 255 bytes.
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Seed:
    """The random numbers of a run: of its weights (and dropout), and of the order of its data."""

    weights: int
    data: int

    @property
    def label(self) -> str:
        """One number where both are the same."""
        return str(self.weights) if self.weights == self.data else f"{self.weights}+{self.data}"

    @property
    def flags(self) -> list[str]:
        """Megatron's --seed moves both."""
        apart = [] if self.weights == self.data else ["--data-seed", str(self.data)]
        return ["--seed", str(self.weights), *apart]


@dataclass(frozen=True)
class Axis:
    """One dimension of a grid: {label of a point: the flags it adds}, with expressions."""

    name: str
    points: dict[str, list[str]]


@dataclass(frozen=True)
class Run:
    """One training run: where it stands in the grid, and its flags, without those of its directory."""

    point: dict[str, str] = field(hash=False)
    seed: Seed
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its directory: the place in the grid and the seed, so that a sweep file can grow."""
        return ",".join(f"{axis}={label}" for axis, label in (self.point | {"seed": self.seed.label}).items())


@dataclass(frozen=True)
class Compare:
    """What is compared: points of `axis` with the point `baseline`, each at its best point of `best_over`."""

    axis: str
    baseline: str
    best_over: str | None

    def pairs(self, runs: Sequence[Run]) -> list[tuple[list[Run], list[Run]]]:
        """For each place on the other axes, the runs there of a point of `axis`, and the baseline's that fit.

        A baseline need not have all axes of what is compared with it: one without an axis serves all values.

        Raises:
            UserError: two runs of one side differ neither in seed nor in `best_over`.
        """
        own = (self.axis, self.best_over)
        baseline = [run for run in runs if run.point.get(self.axis) == self.baseline]
        places: dict[frozenset[tuple[str, str]], list[Run]] = {}
        for run in runs:
            if self.axis in run.point and run not in baseline:
                place = frozenset(item for item in run.point.items() if item[0] != self.best_over)
                places.setdefault(place, []).append(run)
        found = []
        for place, here in places.items():
            fitting = [
                run for run in baseline if {item for item in run.point.items() if item[0] not in own} <= place
            ]
            self._check_one_of_each(here)
            self._check_one_of_each(fitting)
            found.append((here, fitting))
        return found

    def _check_one_of_each(self, runs: Sequence[Run]) -> None:
        seen: dict[tuple[str | None, Seed], Run] = {}
        for run in runs:
            other = seen.setdefault((run.point.get(self.best_over or ""), run.seed), run)
            if other is not run:
                raise UserError(
                    f"compare: {other.name} and {run.name} stand at one place of the comparison; take one of "
                    "them away, or give both the same axes"
                )


@dataclass(frozen=True)
class Plot:
    """A figure: the loss against `x`, a line per point of `series`; or a heat map of `x` and `y`."""

    x: str
    series: str | None = None
    y: str | None = None

    @property
    def name(self) -> str:
        """Of its file."""
        kind = "heat" if self.y else "loss"
        return "-".join(filter(None, (kind, self.x, self.y or self.series)))


@dataclass(frozen=True)
class Sweep:
    """A sweep file. `axes` are the names of all axes, in order; `prepare` are shell commands."""

    title: str
    prepare: tuple[str, ...]
    runs: tuple[Run, ...]
    axes: tuple[str, ...]
    compare: Compare | None = None
    plots: tuple[Plot, ...] = ()


class _Loader(yaml.BaseLoader):
    """Makes text of every scalar, and refuses a key that stands twice, of which PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [str(key) for i, key in enumerate(keys) if key in keys[:i]]:
            raise UserError(
                f"{', '.join(twice)} stands twice in one place, at line {node.start_mark.line + 1}"
            )
        return super().construct_mapping(node, deep)


def load(path: Path, extra: Sequence[str] = ()) -> Sweep:
    """Read a sweep file, and the one that it is like.

    Args:
        extra: flags for every run, which win over those of the file.

    Raises:
        UserError: the file is missing, is not YAML, or says something that cannot be.
    """
    table = _read(path)
    try:
        if like := _texts(table.get("like", ""), "like"):
            table = _continued(_read(path.parent / like[0]), table)
        return _sweep(table, path.stem, list(extra))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read(path: Path) -> Mapping[str, Yaml]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    try:
        return _mapping(yaml.load(text, Loader=_Loader) or "", "the file", KEYS)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _continued(like: Mapping[str, Yaml], table: Mapping[str, Yaml]) -> Mapping[str, Yaml]:
    """`table` with what another file prepares, and that file's base in front of its own."""
    if "like" in like:
        raise UserError(f"like names a file that has a like itself ({like['like']}); name that one")
    base = [*_list(like.get("base", "")), *_list(table.get("base", ""))]
    return {"prepare": like.get("prepare", "")} | dict(table) | {"base": base}


def _sweep(table: Mapping[str, Yaml], name: str, extra: list[str]) -> Sweep:
    grids = [_grid(each) for each in _list(table.get("grid", ""))]
    seeds = [_seed(each) for each in _list(table.get("seeds", "1234"))]
    if not grids or not seeds:
        raise UserError(
            f"{'seeds' if grids else 'grid'} is empty, so there is nothing to run; give at least one "
            + ("seed" if grids else "axis with a value (docs/sweep.md)")
        )
    base = _words(table.get("base", ""), "base")
    runs: dict[str, Run] = {}
    # Seeds outside: what is finished first is the whole grid with one seed.
    for seed, grid in itertools.product(seeds, grids):
        for run in _runs(base, grid, seed, extra):
            if runs.setdefault(run.name, run) != run:
                raise UserError(f"two runs are called {run.name}, with different flags; rename a value")
    axes = tuple(dict.fromkeys(axis.name for grid in grids for axis in grid))
    return Sweep(
        title=str(table.get("title", name)),
        prepare=tuple(_texts(table.get("prepare", ""), "prepare")),
        runs=tuple(runs.values()),
        axes=axes,
        compare=_compare(table["compare"], list(runs.values()), axes) if "compare" in table else None,
        plots=tuple(_plot(each, axes) for each in _list(table.get("plots", ""))),
    )


def _runs(base: list[str], axes: list[Axis], seed: Seed, extra: list[str]) -> Iterator[Run]:
    for labels in itertools.product(*(axis.points for axis in axes)):
        point = {axis.name: label for axis, label in zip(axes, labels, strict=True)}
        words = [*base, *(word for axis in axes for word in axis.points[point[axis.name]]), *extra]
        names = flags.values(words)
        if own := [f"--{name.replace('_', '-')}" for name in _OWN_FLAGS if name in names]:
            raise UserError(f"{', '.join(own)} cannot be given: the sweep gives each run its own")
        run = Run(point, seed, (*flags.fill(words, names | point), *seed.flags))
        if len(run.name) > _LONGEST_NAME:
            raise UserError(f"the name {run.name} is longer than {_LONGEST_NAME} letters; shorten its values")
        yield run


def _grid(content: Yaml) -> list[Axis]:
    table = _mapping(content, "grid")
    return [_axis(str(name), points) for name, points in table.items()]


def _axis(name: str, content: Yaml) -> Axis:
    where = f"grid: {name}"
    if not re.fullmatch(r"[A-Za-z]\w*", name) or name == "seed":
        raise UserError(f"{where}: an axis is called by letters, digits and _, and not seed")
    table = _mapping(content, where)
    if "values" in table or "flags" in table:
        _mapping(content, where, ("flags", "values"))
        template = _words(table.get("flags", ""), f"{where}: flags")
        if not any(re.search(rf"\{{[^{{}}]*\b{name}\b", word) for word in template):
            raise UserError(f"{where}: flags must use {{{name}}}, such as --lr {{{name}}}")
        labels = [_label(each, f"{where}: values") for each in _list(table.get("values", ""))]
        points = dict.fromkeys(labels, template)
    else:
        labels = [_label(each, where) for each in table]
        points = {label: _words(given, f"{where}: {label}") for label, given in table.items()}
    if not points:
        raise UserError(f"{where} is empty; give it a value or take it away")
    if len(points) < len(labels):
        raise UserError(f"{where} has a value twice: {', '.join(labels)}")
    return Axis(name, points)


def _seed(content: Yaml) -> Seed:
    """A number moves weights and data order together; {weights: 1, data: 2} each by its own."""
    if isinstance(content, dict):
        table = _mapping(content, "seeds", ("weights", "data"))
        return Seed(*(_seed_number(table.get(key, ""), f"seeds: {key}") for key in ("weights", "data")))
    number = _seed_number(content, "seeds")
    return Seed(number, number)


def _seed_number(content: Yaml, where: str) -> int:
    # Megatron's own condition on a seed.
    if not isinstance(content, str) or not re.fullmatch("[0-9]+", content) or int(content) == 0:
        raise UserError(f"{where} has {content!r}; a seed is a whole number above 0")
    return int(content)


def _compare(content: Yaml, runs: Sequence[Run], axes: Sequence[str]) -> Compare:
    table = _mapping(content, "compare", _COMPARE_KEYS)
    axis, baseline, best_over = (str(table[key]) if table.get(key) else None for key in _COMPARE_KEYS)
    for key, name in (("axis", axis), ("best_over", best_over)):
        if name not in axes and not (key == "best_over" and name is None):
            raise UserError(f"compare: {key} is {name}; the axes are {', '.join(axes)}")
    labels = dict.fromkeys(run.point[axis] for run in runs if axis in run.point)
    if axis is None or baseline not in labels:
        raise UserError(f"compare: baseline is {baseline}; {axis} has {', '.join(labels)}")
    if axis == best_over:
        raise UserError(f"compare: axis and best_over are both {axis}; they must differ")
    found = Compare(axis, baseline, best_over)
    # Also point by point, as in summary.csv.
    for compare in (found, Compare(axis, baseline, None)):
        compare.pairs(runs)
    return found


def _plot(content: Yaml, axes: Sequence[str]) -> Plot:
    table = _mapping(content, "plots", ("x", "series", "y"))
    for key, axis in table.items():
        if axis not in axes:
            raise UserError(f"plots: {key} is {axis}; the axes are {', '.join(axes)}")
    if "x" not in table or {"series", "y"} <= set(table) or len(set(map(str, table.values()))) < len(table):
        raise UserError("plots: give x, with either series (lines) or y (a heat map), each another axis")
    return Plot(**{key: str(axis) for key, axis in table.items()})


def _label(content: Yaml, where: str) -> str:
    if not isinstance(content, str) or not _LABEL.fullmatch(content):
        raise UserError(
            f"{where} has {content!r}; a value is a number, or a word of letters, digits and _ . + -"
        )
    return content


def _words(content: Yaml, where: str) -> list[str]:
    """Flags, as one text or a list of texts."""
    return [word for text in _texts(content, where) for word in flags.split(text)]


def _texts(content: Yaml, where: str) -> list[str]:
    texts = [text for text in _list(content) if isinstance(text, str)]
    if wrong := [each for each in _list(content) if not isinstance(each, str)]:
        raise UserError(f"{where} has {wrong[0]!r}; give text, such as --num-layers 4")
    return texts


def _list(content: Yaml) -> list[Yaml]:
    """A list, or one thing alone; nothing is an empty list."""
    return content if isinstance(content, list) else [content] if content else []


def _mapping(content: Yaml, where: str, keys: Sequence[str] = ()) -> Mapping[str, Yaml]:
    if not isinstance(content, dict):
        raise UserError(
            f"{where} is {content!r}; give 'key: value' lines" + (f": {', '.join(keys)}" if keys else "")
        )
    if unknown := [str(key) for key in content if keys and key not in keys]:
        raise UserError(f"{where} has the unknown key {', '.join(unknown)}; allowed: {', '.join(keys)}")
    return content
