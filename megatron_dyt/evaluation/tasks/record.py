"""ReCoRD: which entity fills the gap in a statement about a news article (arXiv 1810.12885).

Each entity of the article is put into the gap; the likeliest statement is the answer. It counts by exact
match and by the overlap of words (F1), both with SQuAD's normalization (arXiv 1606.05250, section 6).
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from typing import Any

_HIGHLIGHT = "\n@highlight\n"
_GAP = "@placeholder"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def process_docs(dataset: Any) -> Any:
    """The documents with each entity and answer once, in alphabetical order."""
    return dataset.map(_without_repetitions)


def _without_repetitions(doc: dict[str, Any]) -> dict[str, Any]:
    lists = {name: sorted(set(doc[name])) for name in ("entities", "answers")}
    return {"passage": doc["passage"], "query": doc["query"], **lists}


def doc_to_text(doc: dict[str, Any]) -> str:
    """The article, an empty line, and its highlights as a list that the statement continues."""
    article, *highlights = doc["passage"].strip().split(_HIGHLIGHT)
    return article + "\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)


def doc_to_choice(doc: dict[str, Any]) -> list[str]:
    """The statement with each entity in the gap."""
    return [_statement(doc, entity) for entity in doc["entities"]]


def doc_to_target(doc: dict[str, Any]) -> str:
    """The statement with the first right entity."""
    return _statement(doc, doc["answers"][0])


def _statement(doc: dict[str, Any], entity: str) -> str:
    return f"  - {doc['query']}".replace(_GAP, entity)


def process_results(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """em and f1 of the likeliest entity, each against the answer that suits it best."""
    logprobs = [logprob for logprob, _greedy in results]
    chosen = doc["entities"][logprobs.index(max(logprobs))]
    return {"em": _best(_exact, chosen, doc["answers"]), "f1": _best(_f1, chosen, doc["answers"])}


def _best(measure: Callable[[list[str], list[str]], float], chosen: str, answers: list[str]) -> float:
    return max(measure(_words(chosen), _words(answer)) for answer in answers)


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def _exact(words: list[str], answer: list[str]) -> float:
    return float(words == answer)


def _f1(words: list[str], answer: list[str]) -> float:
    if not words or not answer:
        return _exact(words, answer)
    common = (Counter(words) & Counter(answer)).total()
    return 2 * common / (len(words) + len(answer))
