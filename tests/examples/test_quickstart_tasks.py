"""The quickstart's lm-eval tasks: built by their rules, and run by lm-eval itself, offline."""

import json
import math
import random
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from examples.quickstart import corpus, tasks
from megatron_dyt.errors import UserError

lm_eval = pytest.importorskip("lm_eval")

import datasets  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


@pytest.fixture(scope="module")
def corpus_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus")
    corpus.main(["--output", str(path)])
    return path


@pytest.fixture(scope="module")
def task_directory(corpus_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks with a space")
    assert tasks.main(["--corpus", str(corpus_directory), "--output", str(path)]) == 0
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


@pytest.fixture(scope="module")
def questions(task_directory: Path) -> list[dict[str, Any]]:
    return read(task_directory / "dyt_next_line.jsonl")


def test_questions_are_many_and_their_answers_balanced(questions: list[dict[str, Any]]) -> None:
    assert len(questions) == 400
    assert Counter(question["answer"] for question in questions) == dict.fromkeys(range(4), 100)
    files = Counter(question["path"] for question in questions)
    assert max(files.values()) < 40


def test_the_answer_is_the_line_that_follows(questions: list[dict[str, Any]], corpus_directory: Path) -> None:
    texts = {entry["path"]: entry["text"] for entry in read(corpus_directory / "heldout.jsonl")}
    for question in questions:
        lines = texts[question["path"]].replace("\r\n", "\n").split("\n")
        index = question["line"] - 1
        assert lines[index].rstrip() == question["choices"][question["answer"]]
        assert "\n".join(lines[index - 10 : index]).rstrip() == question["context"]


def test_choices_cannot_be_told_apart_by_form(questions: list[dict[str, Any]]) -> None:
    longest_is_right = 0.0
    for question in questions:
        choices = question["choices"]
        assert len(set(choices)) == 4
        assert len({choice[: len(choice) - len(choice.lstrip())] for choice in choices}) == 1
        lengths = [len(choice.strip()) for choice in choices]
        assert max(lengths) <= 1.1 * min(lengths)
        if lengths[question["answer"]] == max(lengths):
            longest_is_right += 1 / lengths.count(max(lengths))
    # "Take the longest" must be a guess, and so neither better nor worse than one.
    assert longest_is_right / len(questions) == pytest.approx(0.25, abs=0.06)


def test_no_choice_occurs_in_the_training_text_or_its_context(
    questions: list[dict[str, Any]], corpus_directory: Path
) -> None:
    wanted = {choice.strip() for question in questions for choice in question["choices"]}
    for entry in read(corpus_directory / "train.jsonl"):
        assert not wanted & {line.strip() for line in entry["text"].splitlines()}
    for question in questions:
        assert question["choices"][question["answer"]].strip() not in question["context"]


def test_documents_are_bounded_beginnings_of_heldout_files(
    task_directory: Path, corpus_directory: Path
) -> None:
    documents = read(task_directory / "dyt_bits_per_byte.jsonl")
    texts = {entry["path"]: entry["text"] for entry in read(corpus_directory / "heldout.jsonl")}
    total = sum(len(document["text"].encode()) for document in documents)
    assert 100_000 < total < 160_000
    for document in documents:
        assert texts[document["path"]].replace("\r\n", "\n").startswith(document["text"])
        assert document["text"].endswith("\n")


def test_cut_at_line_keeps_whole_lines() -> None:
    assert tasks.cut_at_line("ab\ncd\nef\n", 6) == "ab\ncd\n"
    assert tasks.cut_at_line("éé\ncd\n", 6) == "éé\n"
    assert tasks.cut_at_line("a long first line\nx\n", 3) == "a long first line\n"
    assert tasks.cut_at_line("ab", 100) == "ab"


def test_few_files_give_longer_documents() -> None:
    text = "".join(f"line {index}\n" for index in range(2000))
    documents = tasks.bits_per_byte_documents([("a", text), ("b", text), ("c", "short")], 10_000)
    assert [document["path"] for document in documents] == ["a", "b"]
    assert all(4980 < len(document["text"]) <= 5000 for document in documents)


def test_known_and_repeated_lines_are_dropped() -> None:
    lines = [tasks.Line("a", n, "", text) for n, text in enumerate(["  x", "y", "z", "z ", "w"])]
    kept = tasks.without_known(lines, [("t", "if 1:\n        x\n"), ("u", "w\n")])
    assert [line.text for line in kept] == ["y"]


def test_same_seed_same_files_other_seed_other_files(
    corpus_directory: Path, task_directory: Path, tmp_path: Path
) -> None:
    stamps = {path.name: path.stat().st_mtime_ns for path in task_directory.iterdir()}
    arguments = ["--corpus", str(corpus_directory), "--output"]
    tasks.main([*arguments, str(task_directory)])
    assert {path.name: path.stat().st_mtime_ns for path in task_directory.iterdir()} == stamps
    tasks.main([*arguments, str(tmp_path), "--seed", "7", "--questions", "80"])
    other = read(tmp_path / "dyt_next_line.jsonl")
    assert len(other) == 80
    assert other[:10] != read(task_directory / "dyt_next_line.jsonl")[:10]


def test_bad_input(corpus_directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"heldout.jsonl does not exist"):
        tasks.main(["--corpus", str(tmp_path), "--output", str(output)])
    with pytest.raises(UserError, match="--questions must be at least 40"):
        tasks.main(["--corpus", str(tmp_path), "--output", str(output), "--questions", "3"])
    (tmp_path / "heldout.jsonl").write_text('{"text": "no path"}\n')
    with pytest.raises(UserError, match=r"heldout.jsonl, line 1: .*corpus.py"):
        tasks.main(["--corpus", str(tmp_path), "--output", str(output)])
    (tmp_path / "heldout.jsonl").write_text('{"path": "a.py", "text": "x = 1"}\n')
    (tmp_path / "train.jsonl").write_text('{"path": "b.py", "text": "x = 1"}\n')
    with pytest.raises(UserError, match="gives 0 next-line questions"):
        tasks.main(["--corpus", str(tmp_path), "--output", str(output)])
    assert not output.exists()


class ScoringLM(LM):
    """A language model whose log-likelihoods come from a function of (context, continuation)."""

    def __init__(self, score: Callable[[str, str], float]) -> None:
        super().__init__()
        self.score = score

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(self.score(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [self.score("", request.args[0]) for request in requests]

    def generate_until(self, requests: list[Any]) -> NoReturn:
        raise NotImplementedError


@pytest.fixture
def evaluate(
    task_directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, Callable[[str, str], float]], dict[str, Any]]:
    """Run one task by lm-eval on a scoring function, with the network shut off."""

    def refuse(*_: object) -> NoReturn:
        raise AssertionError("the tasks must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(task: str, score: Callable[[str, str], float]) -> dict[str, Any]:
        manager = TaskManager(include_path=str(task_directory), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=ScoringLM(score), tasks=[task], task_manager=manager, bootstrap_iters=0
        )
        results: dict[str, Any] = found["results"][task]
        return results

    return run


Evaluate = Callable[[str, Callable[[str, str], float]], dict[str, Any]]


def test_oracle_is_always_right(evaluate: Evaluate, questions: list[dict[str, Any]]) -> None:
    right = {(question["context"], "\n" + question["choices"][question["answer"]]) for question in questions}
    results = evaluate("dyt_next_line", lambda *request: float(request in right))
    assert results["acc,none"] == 1.0


def test_guessing_is_at_chance(evaluate: Evaluate) -> None:
    state = random.Random(0)
    results = evaluate("dyt_next_line", lambda *_: state.random())
    # 400 questions: the standard error is 0.022.
    assert results["acc,none"] == pytest.approx(0.25, abs=0.07)


def test_bits_per_byte_of_a_known_model(evaluate: Evaluate) -> None:
    """A model that gives every byte the probability 1/8 spends exactly 3 bits on it."""
    results = evaluate("dyt_bits_per_byte", lambda _, text: -len(text.encode()) * math.log(8))
    assert results["bits_per_byte,none"] == pytest.approx(3.0, rel=1e-12)
