"""A checkpoint whose tokenizer is Hugging Face's and adds special tokens of its own accord."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.checkpoint_model import load_model
from megatron_dyt.evaluation.lm import MegatronDyTLM
from tests.conftest import forget_run
from tests.license_tokenizer import TEXT

from .conftest import SEQUENCE
from .toy import naive_score

BOS, END = 0, 2
SPECIAL = ["<s>", "</s>", "<|end|>"]


@pytest.fixture(scope="session")
def tokenizer_directory(home: Path) -> Path:
    """A byte-level BPE that puts BOS before a text and EOS after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", 1)]
    )
    directory = home / "hugging_face"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:]
    ).save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoint(
    megatron_run: Callable[[list[str]], SimpleNamespace],
    tiny_llama: list[str],
    tokenizer_directory: Path,
    home: Path,
) -> Path:
    """Trained for all tests of this file."""
    directory = home / "with_hugging_face"
    if not directory.exists():
        flags = f"--seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --train-iters 2"
        flags += f" --tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer_directory}"
        flags += f" --save {directory} --save-interval 2 --ckpt-format torch_dist"
        megatron_run([*tiny_llama, *flags.split()])
        forget_run()
    return directory


def request(kind: str, *arguments: str) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("task", 0, 1))


def test_only_one_bos_and_no_eos(checkpoint: Path, fresh_megatron: None) -> None:
    loaded = load_model(str(checkpoint))
    lm = MegatronDyTLM.of(loaded, mode="flat")
    backend: Any = loaded.tokenizer._tokenizer.tokenizer  # type: ignore[attr-defined]
    words = backend.encode("copyright owner", add_special_tokens=False)
    assert lm.tok_encode("copyright owner") == [BOS, *words]
    assert lm.tok_encode("copyright owner", add_special_tokens=False) == words
    assert loaded.tokenizer.detokenize([BOS, *words]) == "copyright owner"

    def logits(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            positions = torch.arange(len(tokens))[None]
            output = loaded.model(torch.tensor([tokens]), positions, None)
        return output[0, -1, : loaded.tokenizer.vocab_size].double()

    each, greedy = naive_score(logits, [BOS, *words[:-1]], words)
    own = len(backend.encode(" owner", add_special_tokens=False))
    ((logprob, is_greedy),) = lm.loglikelihood([request("loglikelihood", "copyright", " owner")])
    assert logprob == pytest.approx(sum(each[-own:]), abs=1e-4)
    (rolling,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", "copyright owner")])
    assert rolling == pytest.approx(sum(each), abs=1e-4)
    assert is_greedy or not greedy


def test_special_token_as_stop(
    checkpoint: Path, fresh_megatron: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not in the text of an answer, and ends it all the same."""
    lm = MegatronDyTLM.of(load_model(str(checkpoint)), mode="flat")
    words = lm.tok_encode("copyright owner", add_special_tokens=False)

    def scripted(_prompts: list[list[int]], **options: Any) -> list[list[int]]:
        assert options["done"]([*words, END])
        assert not options["done"](words)
        return [[*words, END]]

    monkeypatch.setattr(lm.generator, "generate", scripted)
    asked = Instance("generate_until", {}, ("a", {"until": ["<|end|>"]}), 0, metadata=("task", 0, 1))
    assert lm.generate_until([asked]) == ["copyright owner"]


def test_tokenizer_that_is_not_there(checkpoint: Path, fresh_megatron: None) -> None:
    with pytest.raises(UserError, match=r"nowhere.*--tokenizer-model"):
        load_model(str(checkpoint), tokenizer_model="./nowhere")
