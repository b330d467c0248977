"""The lm-eval model: tokens, windows and stops, checked on a model and tokenizer of letters."""

import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from megatron_dyt.errors import UserError
from megatron_dyt.evaluation import checkpoint_model, generation
from megatron_dyt.evaluation import lm as lm_module
from megatron_dyt.evaluation.cache import ResultCache
from megatron_dyt.evaluation.checkpoint_model import load_model, prefix_token
from megatron_dyt.evaluation.forward import Forward
from megatron_dyt.evaluation.lm import MegatronDyTLM
from megatron_dyt.evaluation.scoring import Scorer

from .conftest import Trained
from .toy import BOS, EOD, VOCABULARY, ToyModel, ToyTokenizer, naive_score


def toy_lm(max_length: int = 16) -> MegatronDyTLM:
    forward = Forward(ToyModel(), vocab_size=VOCABULARY, device=torch.device("cpu"))
    scorer = Scorer(forward, batch_tokens=64)
    return MegatronDyTLM(scorer, ToyTokenizer(), max_length=max_length)


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("task", 0, 1))


def loglikelihood(lm: MegatronDyTLM, context: str, continuation: str) -> tuple[float, bool]:
    return lm.loglikelihood([request("loglikelihood", context, continuation)])[0]


def expected(context: list[int], continuation: list[int]) -> tuple[float, bool]:
    each, greedy = naive_score(ToyModel().logits, (context + continuation)[:-1], continuation)
    return pytest.approx(sum(each), abs=1e-5), greedy


TOKENS = ToyTokenizer().tokenize


def test_context_starts_with_bos() -> None:
    assert loglikelihood(toy_lm(), "abc", " def") == expected([BOS, *TOKENS("abc")], TOKENS(" def"))
    assert loglikelihood(toy_lm(), "", "def") == expected([BOS], TOKENS("def"))


def test_spaces_at_the_end_of_the_context_belong_to_the_continuation() -> None:
    assert loglikelihood(toy_lm(), "abc ", "def") == expected([BOS, *TOKENS("abc")], TOKENS(" def"))


def test_long_context_loses_its_oldest_tokens() -> None:
    context = "the quick brown fox jumps"
    kept = TOKENS(context)[-(16 + 1 - 4) :]
    assert loglikelihood(toy_lm(), context, " def") == expected(kept, TOKENS(" def"))


def test_continuation_longer_than_the_model_is_scored_in_windows() -> None:
    text = "the quick brown fox"
    windows = [([BOS], TOKENS(text[:16])), (TOKENS(text[2:16]), TOKENS(text[16:]))]
    parts = [naive_score(ToyModel().logits, [*a, *b][:-1], b)[0] for a, b in windows]
    logprob, greedy = loglikelihood(toy_lm(), "", text)
    assert logprob == pytest.approx(sum(map(sum, parts)), abs=1e-5)
    assert not greedy


def test_continuation_that_merges_into_the_context_is_still_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = toy_lm()

    def merging(text: str) -> list[int]:
        return TOKENS(text.replace("ab", "x"))

    monkeypatch.setattr(lm.tokenizer, "tokenize", merging, raising=False)
    assert loglikelihood(lm, "a", "b") == expected([BOS, *TOKENS("a")], TOKENS("b"))


def test_rolling_covers_each_token_once() -> None:
    lm = toy_lm()
    texts = ["the quick brown fox jumps over", "short", ""]
    scores = lm.loglikelihood_rolling([request("loglikelihood_rolling", text) for text in texts])
    assert scores[1] == expected([BOS], TOKENS("short"))[0]
    assert scores[2] == 0.0
    # The first 16 tokens after BOS, then 14 more, the window's first 2 inputs being context.
    windows = [([BOS], TOKENS(texts[0][:16])), (TOKENS(texts[0][13:16]), TOKENS(texts[0][16:]))]
    parts = [naive_score(ToyModel().logits, [*a, *b][:-1], b)[0] for a, b in windows]
    assert scores[0] == pytest.approx(sum(map(sum, parts)), abs=1e-5)


def generate(lm: MegatronDyTLM, contexts: list[str], **options: Any) -> list[str]:
    return lm.generate_until([request("generate_until", text, options) for text in contexts])


def test_generation_is_cut_before_the_stop() -> None:
    lm = toy_lm(64)
    full = generate(lm, ["abc", "xyz"], max_gen_toks=10, until=[])
    assert [len(text) for text in full] == [10, 10]
    stop = full[0][3:5]
    cut = generate(lm, ["abc", "xyz"], max_gen_toks=10, until=[stop])
    assert cut[0] == full[0][: full[0].index(stop)]
    assert cut[1] == full[1].split(stop)[0]


def test_generation_ends_with_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = toy_lm(64)
    letters = TOKENS("ab")

    def scripted(prompts: list[list[int]], **options: Any) -> list[list[int]]:
        assert prompts == [[BOS, *TOKENS("xyz")]]
        assert options["done"]([*letters, EOD])
        assert not options["done"](letters)
        return [[*letters, EOD]]

    monkeypatch.setattr(lm.generator, "generate", scripted)
    assert generate(lm, ["xyz"], until=["."]) == ["ab"]


def test_requests_with_different_options_keep_their_order() -> None:
    lm = toy_lm(64)
    requests = [
        request("generate_until", "abc", {"until": [], "max_gen_toks": 2}),
        request("generate_until", "xyz", {"until": [], "max_gen_toks": 4}),
        request("generate_until", "def", {"until": [], "max_gen_toks": 2}),
    ]
    texts = lm.generate_until(requests)
    assert [len(text) for text in texts] == [2, 4, 2]
    assert texts[2] == generate(lm, ["def"], until=[], max_gen_toks=2)[0]


def test_prompt_leaves_room_for_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = toy_lm(16)
    seen: list[Any] = []

    def spy(prompts: list[list[int]], **options: Any) -> list[list[int]]:
        seen.append((prompts, options["max_new"], options["max_length"]))
        return [[]]

    monkeypatch.setattr(lm.generator, "generate", spy)
    for wanted, text in ((6, " brown fox"), (1000, "rown fox")):
        generate(lm, ["the quick brown fox"], until=[], max_gen_toks=wanted)
        assert seen.pop() == ([TOKENS(text)], wanted, 16)


def test_generation_ends_at_the_model_s_length() -> None:
    assert [len(text) for text in generate(toy_lm(16), ["abc", "abcdefgh"], until=[])] == [12, 8]


def test_unknown_generation_option() -> None:
    with pytest.raises(UserError, match=r"top_p.*allowed: do_sample, max_gen_toks"):
        generate(toy_lm(), ["abc"], until=[], top_p=0.9)


@pytest.mark.parametrize("temperature", [{}, {"temperature": -1.0}])
def test_sampling_at_no_temperature(temperature: dict[str, float]) -> None:
    """To sample without saying how would be greedy, in silence."""
    with pytest.raises(UserError, match="positive temperature"):
        generate(toy_lm(), ["abc"], until=[], do_sample=True, **temperature)
    greedy = generate(toy_lm(64), ["abc"], until=[], max_gen_toks=4)
    assert generate(toy_lm(64), ["abc"], until=[], max_gen_toks=4, do_sample=True, temperature=0) == greedy


def test_tokenizer_without_bos() -> None:
    tokenizer = ToyTokenizer()
    assert prefix_token(tokenizer) == BOS
    for missing in (None, -1):
        tokenizer.bos = missing
        assert prefix_token(tokenizer) == EOD

    class NoBos(ToyTokenizer):
        @property
        def bos(self) -> int:
            raise AttributeError("no bos")

    assert prefix_token(NoBos()) == EOD


@pytest.mark.parametrize(
    ("in_data", "asked", "bos"),
    [
        (None, None, True),
        (True, None, True),
        (False, None, False),
        (True, False, False),
        (False, True, True),
    ],
)
def test_contexts_begin_as_documents_did(
    trained: Callable[[str], Trained],
    fresh_megatron: None,
    monkeypatch: pytest.MonkeyPatch,
    in_data: bool | None,
    asked: bool | None,
    bos: bool,
) -> None:
    """Data without BOS: a document begins after the end of the one before, and BOS was never trained."""
    monkeypatch.setattr(checkpoint_model, "documents_begin_with_bos", lambda _: in_data)
    loaded = load_model(str(trained("DyT").directory), bos=asked)
    assert loaded.prefix_token == (1 if bos else 2)
    assert ("end of document" in str(loaded)) != bos
    assert MegatronDyTLM.of(loaded).tok_encode("a")[0] == loaded.prefix_token


def test_registered_beside_the_built_in_models() -> None:
    assert get_model("megatron_dyt") is MegatronDyTLM
    assert get_model("dummy").__name__ == "DummyLM"


def test_entry_point() -> None:
    """What lm-eval looks up: a name and `module:object`."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    assert name == "megatron_dyt"
    assert EntryPoint(name, value, "lm_eval.models").load() is MegatronDyTLM


def test_one_rank_for_lm_eval() -> None:
    assert (toy_lm().rank, toy_lm().world_size) == (0, 1)
    assert toy_lm().eot_token_id == EOD


def test_made_by_lm_eval_from_a_string(trained: Callable[[str], Trained], fresh_megatron: None) -> None:
    directory = trained("DyT").directory
    lm = get_model("megatron_dyt").create_from_arg_string(
        f"load={directory},ckpt_step=2,batch_tokens=77", {"batch_size": 1}
    )
    assert lm.scorer.batch_tokens == 77
    assert lm.tok_encode("a b")[0] == 1
    assert lm.tok_encode("a b", add_special_tokens=False) == lm.tok_encode("a b")[1:]
    assert lm_module.MegatronDyTLM is type(lm)
    assert lm.scorer.share == 32


@pytest.mark.parametrize(
    ("given", "message"), [({"load": "x", "batch": 3}, "--model_args batch.*mode"), ({}, "without load")]
)
def test_arguments_that_it_does_not_have(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MegatronDyTLM.create_from_arg_obj(given)


def test_generated_answers_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = toy_lm(64)
    expected = generate(lm, ["abc", "xyz"], max_gen_toks=5, until=["q"])
    lm.scorer.cache = ResultCache(tmp_path, "toy")
    assert generate(lm, ["abc", "abc"], max_gen_toks=5, until=["q"]) == [expected[0]] * 2
    asked: list[list[int]] = []
    compute = lm.generator.generate

    def spy(prompts: list[list[int]], **options: Any) -> list[list[int]]:
        asked.extend(prompts)
        return compute(prompts, **options)

    monkeypatch.setattr(lm.generator, "generate", spy)
    assert generate(lm, ["abc", "xyz"], max_gen_toks=5, until=["q"]) == expected
    assert asked == [[BOS, *TOKENS("xyz")]]
    # What is sampled is made anew.
    asked.clear()
    for _ in range(2):
        generate(lm, ["abc"], max_gen_toks=5, until=["q"], do_sample=True, temperature=1.0)
    assert len(asked) == 2
    drawn = generate(lm, ["abc", "xyz"], max_gen_toks=5, until=[], do_sample=True, temperature=1.0)
    prompts = [[BOS, *TOKENS(text)] for text in ("abc", "xyz")]
    tokens = compute(prompts, max_new=5, max_length=64, done=lambda new: False, temperature=1.0)
    assert drawn == [ToyTokenizer().detokenize(new) for new in tokens]
    assert drawn[0] != drawn[1]


def test_a_killed_generation_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "ROUND", 1)
    texts = ["a", "bcd", "efghijk", "lm"]
    whole = generate(toy_lm(64), texts, max_gen_toks=5, until=["q"])
    lm = toy_lm(64)
    lm.generator.batch_tokens = 1  # A request to a batch.
    lm.scorer.cache = ResultCache(tmp_path, "toy")
    compute, computed = lm.generator._continue, []

    def dies(rows: list[list[int]], *given: Any) -> list[list[int]]:
        computed.append(rows)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return compute(rows, *given)

    monkeypatch.setattr(lm.generator, "_continue", dies)
    with pytest.raises(KeyboardInterrupt):
        generate(lm, texts, max_gen_toks=5, until=["q"])
    assert generate(lm, texts, max_gen_toks=5, until=["q"]) == whole
    assert len(computed) == 3 + 2


def test_longer_requests_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["the quick brown fox jumps", "abc", "the quick br"]
    toy_lm().loglikelihood([request("loglikelihood", text, " def") for text in texts])
    assert "1 of 3 requests are longer than 16 tokens" in capsys.readouterr().out
