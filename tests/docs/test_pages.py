"""README and docs: their Python blocks run, their links and the files that they name are there."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from megatron_dyt.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "patches/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n+)?```python\n(?P<code>.*?)```", re.DOTALL)
# The blocks that may carry a "not run", by page.
MAY_NOT_RUN = {"docs/integration.md": 2}

# What a page's blocks find when they run: names, as code that makes them.
GIVEN = {
    "docs/metrics.md": """
import json, os
from tests.report.made_up_runs import start_line, step_line, validation_line
os.makedirs("out/checkpoint")
lines = [start_line(lr=0.001), step_line(1), validation_line(1, 3.0)]
open("out/checkpoint/metrics.jsonl", "w").write("".join(json.dumps(line) + chr(10) for line in lines))
""",
    "docs/huggingface.md": """
import shutil
import tokenizers, transformers
from megatron_dyt.hf import modeling_llama_dyt as modeling
shape = dict(vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
config = modeling.LlamaDyTConfig(**shape)
config.auto_map = {
    "AutoConfig": "modeling_llama_dyt.LlamaDyTConfig",
    "AutoModelForCausalLM": "modeling_llama_dyt.LlamaDyTForCausalLM",
}
modeling.LlamaDyTForCausalLM(config).save_pretrained("DIR")
shutil.copy(modeling.__file__, "DIR")
words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"The": 0, "<unk>": 1}, unk_token="<unk>"))
names = ["input_ids", "attention_mask"]
transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=names).save_pretrained("DIR")
""",
}
GIVEN["docs/serving.md"] = GIVEN["docs/huggingface.md"]
# Pages in one process: what must come before Megatron is imported, first.
ORDER = ("docs/cpu-runtime.md", "docs/convert.md", "docs/huggingface.md", "docs/serving.md")
RUNNER = """
import json, sys, traceback
results = {}
for page, blocks in json.load(sys.stdin):
    namespace = {"__name__": "a_page"}
    results[page] = None
    sys.modules["a_page"] = type(sys)("a_page")  # Where dataclasses look for the module of a class.
    for place, code in blocks:
        try:
            exec(compile(code, place, "exec"), namespace)
        except BaseException:
            results[page] = traceback.format_exc()
            break
json.dump(results, open("results.json", "w"))
"""


def blocks_to_run(page: str) -> list[tuple[str, str]]:
    """(place, code) of a page, what it is given first."""
    text = (ROOT / page).read_text()
    found = [(f"{page}: what is given", GIVEN[page])] if page in GIVEN else []
    for match in BLOCK.finditer(text):
        if match["reason"] is None:
            found.append((f"{page}:{text[: match.start('code')].count(chr(10)) + 1}", match["code"]))
    return found


RUN = sorted(
    (
        page
        for page in NAMES
        if any(match["reason"] is None for match in BLOCK.finditer((ROOT / page).read_text()))
    ),
    key=lambda page: ORDER.index(page) if page in ORDER else len(ORDER),
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """The error of each page, None where its blocks ran; all in one process, away from the checkout."""
    place = tmp_path_factory.mktemp("pages")
    pages = json.dumps([(page, blocks_to_run(page)) for page in RUN])
    environment = {"HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=pages,
        text=True,
        cwd=place,
        env=os.environ | environment,
        capture_output=True,
    )
    assert process.returncode == 0, process.stderr
    results: dict[str, str | None] = json.loads((place / "results.json").read_text())
    return results


@pytest.mark.needs("training_loop")
@pytest.mark.parametrize("page", RUN)
def test_python_blocks_run(page: str, outcome: dict[str, str | None]) -> None:
    assert outcome[page] is None, outcome[page]


def test_blocks_that_do_not_run_are_few_and_say_why() -> None:
    found = {
        page: sum(match["reason"] is not None for match in BLOCK.finditer((ROOT / page).read_text()))
        for page in NAMES
    }
    assert {page: count for page, count in found.items() if count} == MAY_NOT_RUN


# ---- links and files ----

LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?\s*\)")
# A path in code: `mcore/spec.py`, `tests/ops/test_dyt.py::test_x`, `bash scripts/setup.sh`.
PATH = re.compile(r"`(?:\S+ )*?([\w.-]+(?:/[\w.-]+)*\.(?:py|sh|yaml|md|c))(?:::?[\w.\[\]-]+)?(?: [^`]*)?`")
# Files of Megatron, of PyTorch, and placeholders.
ELSEWHERE = re.compile(
    r"pretrain_gpt\.py|preprocess_data\.py|finalize_model_grads\.py|rerun_state_machine\.py|.*NAME\.py"
    r"|.*/elastic/multiprocessing/api\.py|(?:megatron|tensor_parallel|pipeline_parallel)/.*"
)
FOLDERS = ("megatron_dyt", "tests", "benchmarks", "examples", "scripts")
MODULE = re.compile(r"\bmegatron_dyt((?:\.\w+)+)")
# Not `docker run megatron-dyt bash`.
COMMAND = re.compile(r"(?:megatron-dyt|-m megatron_dyt) (?!bash\b)([a-z][\w-]*)")


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of headings as GitHub makes them."""
    heads = re.findall(
        r"^#+ +(.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page: str) -> None:
    place = ROOT / page
    dead = []
    for link in LINK.findall(without_code(place.read_text())):
        if re.match(r"https?:|mailto:", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (place.parent / file).resolve() if file else place
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


@cache
def names_of_files() -> set[str]:
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")}


@pytest.mark.parametrize("page", [name for name in NAMES if name != "CHANGELOG.md"])
def test_files_that_are_named_exist(page: str) -> None:
    """A path is from the checkout, from megatron_dyt/ or from the page; a mere name is that of any file."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    places = (ROOT, ROOT / "megatron_dyt", (ROOT / page).parent)
    gone = [
        path
        for path in PATH.findall(text)
        if not ELSEWHERE.fullmatch(path)
        and not any((place / path).exists() for place in places)
        and not ("/" not in path and path in names_of_files())
    ]
    assert gone == []


def is_there(dotted: str) -> bool:
    """Whether `.a.b.name` is a module of megatron_dyt, or a name in one."""
    place = ROOT / "megatron_dyt"
    for part in dotted.split(".")[1:]:
        if (place / part).is_dir() or (place / f"{part}.py").is_file():
            place = place / part
        else:
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            return re.search(rf"\b{part}\b", file.read_text()) is not None
    return True


@pytest.mark.parametrize("page", NAMES)
def test_modules_and_commands_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    assert [name for name in MODULE.findall(text) if not is_there(name)] == []
    assert [name for name in COMMAND.findall(text) if name not in COMMANDS] == []
