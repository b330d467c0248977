"""The 15 tasks of the paper's Table 4, and their results beside it.

The paper (arXiv 2503.10622) gives a mean over 15 zero-shot tasks for each size, but neither the metric
of each task nor the harness's version. Its list is OpenLLaMA's (github.com/openlm-research/open_llama)
without CB and WSC, whose table averages over every figure that the harness gave: `acc` and `acc_norm`
where there are both, `em` and `f1` of ReCoRD. So two means are reported: one metric for each task, and
one over all figures as in that table.
"""

from argparse import Namespace
from typing import Any, NamedTuple

from megatron_dyt import recipes

GROUP = "dyt_paper"


class PaperTask(NamedTuple):
    """One task.

    Attributes:
        split: of the data set, which is evaluated.
        metric: the one figure of this task: acc_norm where the harness has it (answers of several words
            differ in length), else the share of right answers.
        others: the harness's further figures.
        columns: what a document must have.
        folder: of the task's file, in lm-eval's tasks; None for this package's own.
    """

    split: str
    metric: str
    others: tuple[str, ...]
    columns: tuple[str, ...]
    folder: str | None


_ANLI = ("premise", "hypothesis", "label")
_CHOICES = ("choices", "answerKey")
_HELLASWAG = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
_RECORD = ("passage", "query", "entities", "answers")
_WIC = ("sentence1", "sentence2", "start1", "end1", "label")
_WINOGRANDE = ("sentence", "option1", "option2", "answer")
TASKS = {
    "anli_r1": PaperTask("test_r1", "acc", (), _ANLI, "anli"),
    "anli_r2": PaperTask("test_r2", "acc", (), _ANLI, "anli"),
    "anli_r3": PaperTask("test_r3", "acc", (), _ANLI, "anli"),
    "arc_challenge": PaperTask("test", "acc_norm", ("acc",), ("question", *_CHOICES), "arc"),
    "arc_easy": PaperTask("test", "acc_norm", ("acc",), ("question", *_CHOICES), "arc"),
    "boolq": PaperTask("validation", "acc", (), ("passage", "question", "label"), "super_glue/boolq"),
    "hellaswag": PaperTask("validation", "acc_norm", ("acc",), _HELLASWAG, "hellaswag"),
    "openbookqa": PaperTask("test", "acc_norm", ("acc",), ("question_stem", *_CHOICES), "openbookqa"),
    "piqa": PaperTask("validation", "acc_norm", ("acc",), ("goal", "sol1", "sol2", "label"), "piqa"),
    "record": PaperTask("validation", "em", ("f1",), _RECORD, None),
    "rte": PaperTask("validation", "acc", (), ("sentence1", "sentence2", "label"), "glue/rte"),
    "truthfulqa_mc1": PaperTask("validation", "acc", (), ("question", "mc1_targets"), "truthfulqa"),
    "truthfulqa_mc2": PaperTask("validation", "acc", (), ("question", "mc2_targets"), "truthfulqa"),
    "wic": PaperTask("validation", "acc", (), _WIC, "super_glue/wic"),
    "winogrande": PaperTask("validation", "acc", (), _WINOGRANDE, "winogrande"),
}


def summary(results: dict[str, dict[str, Any]], args: Namespace) -> dict[str, Any] | None:
    """The figures of the 15 tasks in lm-eval's `results`, with both means, beside the paper's Table 4.

    `args` are the checkpoint's: its normalization and shape choose the figure of Table 4, if it has one.
    None when not all tasks were evaluated.
    """
    if not set(TASKS) <= set(results):
        return None
    figures = {name: _figures(results[name], task) for name, task in TASKS.items()}
    every = [value for row in figures.values() for value in (row["value"], *row["others"].values())]
    return {
        "tasks": figures,
        "mean": sum(row["value"] for row in figures.values()) / len(figures),
        "mean_of_all_figures": sum(every) / len(every),
        "figures": len(every),
        "paper": {"table_4": table_4(), **_own_row(args)},
    }


def _figures(metrics: dict[str, Any], task: PaperTask) -> dict[str, Any]:
    return {
        "metric": task.metric,
        "value": metrics[f"{task.metric},none"],
        "stderr": metrics.get(f"{task.metric}_stderr,none"),
        "others": {name: metrics[f"{name},none"] for name in task.others},
    }


def table_4() -> dict[str, dict[str, float]]:
    """The paper's means by size, from the recipes."""
    papers = {name: recipes.load(name).paper for name in recipes.names()}
    return {
        name: {"RMSNorm": paper["norm_zero_shot"], "DyT": paper["dyt_zero_shot"]}
        for name, paper in papers.items()
        if paper
    }


def _own_row(args: Namespace) -> dict[str, Any]:
    """Size and mean of the paper's model of this shape, None where it has none."""
    shape = (args.num_layers, args.hidden_size, args.ffn_hidden_size)
    for name, means in table_4().items():
        recipe = recipes.load(name)
        if shape == (recipe.num_layers, recipe.hidden_size, recipe.ffn_hidden_size):
            return {"size": name, "mean": means.get(args.normalization)}
    return {"size": None, "mean": None}


def format_summary(found: dict[str, Any], normalization: str, harness: str, limit: int | None) -> str:
    """`summary` as Markdown tables, with what the means can and cannot be compared with."""
    rows = [["task", "metric", "value", "stderr", "others"], ["---"] * 5]
    for name, row in found["tasks"].items():
        others = ", ".join(f"{other} {value:.4f}" for other, value in row["others"].items())
        error = row["stderr"]
        shown = f"{error:.4f}" if isinstance(error, float) else ""
        rows.append([name, row["metric"], f"{row['value']:.4f}", shown, others])
    rows.append(["mean of the 15", "", f"{found['mean']:.4f}", "", ""])
    rows.append(
        [f"mean of all {found['figures']} figures", "", f"{found['mean_of_all_figures']:.4f}", "", ""]
    )
    return "\n\n".join([markdown(rows), markdown(_paper_rows(found, normalization)), _remark(harness, limit)])


def _paper_rows(found: dict[str, Any], normalization: str) -> list[list[str]]:
    own = found["paper"]["size"]
    rows = [["Table 4 of the paper", "RMSNorm", "DyT", "this checkpoint"], ["---"] * 4]
    for size, means in found["paper"]["table_4"].items():
        mine = f"{normalization} {found['mean']:.3f} / {found['mean_of_all_figures']:.3f}"
        rows.append([size, f"{means['RMSNorm']:.3f}", f"{means['DyT']:.3f}", mine if size == own else ""])
    if own is None:
        rows.append(["of another size", "", "", f"{found['mean']:.3f} / {found['mean_of_all_figures']:.3f}"])
    return rows


def _remark(harness: str, limit: int | None) -> str:
    text = (
        f"Zero-shot, lm-eval {harness}. This checkpoint: mean of the 15 / mean of all figures. The paper "
        f"names neither the metric of a task nor the harness's version, so a difference may be theirs."
    )
    if limit is not None:
        text += f" Only the first {limit} documents of each task were used: not comparable with it."
    return text


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)
