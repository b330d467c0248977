"""The lm-eval model `megatron_dyt`: a Megatron GPT model behind lm-eval's interface.

lm-eval sees one rank (`world_size` 1), so every data-parallel rank builds all requests; the
`Scorer` deals the batches over the ranks and gives every rank all results.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

# Built-in models register themselves only into an empty registry: theirs first, then ours.
import lm_eval.models  # noqa: F401
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.scoring import DEFAULT_BATCH_TOKENS, Item, Score, Scorer

_GENERATION_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature"}


class TextTokenizer(Protocol):
    """What is used of Megatron's tokenizers."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eod(self) -> int: ...
    def tokenize(self, text: str) -> list[int]: ...
    def detokenize(self, ids: list[int]) -> str: ...


@register_model("megatron_dyt")
class MegatronDyTLM(TemplateLM):
    """Scores lm-eval's requests with `scorer`; texts of more than `max_length` tokens are windowed.

    Contexts start with the tokenizer's BOS, as documents did in training, or with its
    end-of-document token when it has no BOS.
    """

    def __init__(self, scorer: Scorer, tokenizer: TextTokenizer, *, max_length: int) -> None:
        super().__init__()
        self.scorer = scorer
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._prefix_token = prefix_token(tokenizer)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> MegatronDyTLM:
        """For lm-eval's own command line: `--model megatron_dyt --model_args load=DIR,...`.

        The arguments are those of `checkpoint_model.load_model`, and `batch_tokens`. lm-eval's own
        `additional_config` (batch size, device) does not apply: batches are sized by tokens.
        """
        from megatron_dyt.evaluation.checkpoint_model import load_model

        options = dict(arg_dict)
        batch_tokens = int(options.pop("batch_tokens", DEFAULT_BATCH_TOKENS))
        return load_model(**options).language_model(batch_tokens)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> MegatronDyTLM:
        """`create_from_arg_obj` for `name=value,name=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """The token that every context starts with."""
        return self._prefix_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Tokens of `string`, after the prefix token unless `add_special_tokens` is False."""
        tokens = list(self.tokenizer.tokenize(string))
        return tokens if add_special_tokens is False else [self.prefix_token_id, *tokens]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of each request's continuation after its context."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._is_silent)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of `max_length` that do not overlap."""
        windows = [list(self._rolling_windows(request.args[0])) for request in requests]
        return [score.logprob for score in self._score_windows(windows, "loglikelihood_rolling")]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after each request's context, cut before the first of its stop strings."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            contexts = [requests[i].args[0] for i in indices]
            for i, text in zip(indices, self._generate(contexts, requests[indices[0]].args[1]), strict=True):
                texts[i] = text
        return texts

    # --- log-probabilities ------------------------------------------------------------------------

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval's, but a continuation whose tokens merge into the context's keeps its own."""
        context_tokens, tokens = super()._encode_pair(context, continuation)
        return context_tokens, tokens or self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_options: Any,
    ) -> list[tuple[float, bool]]:
        windows = [list(self._windows(context, tokens)) for _, context, tokens in requests]
        return list(self._score_windows(windows, "loglikelihood"))

    def _windows(self, context: list[int], continuation: list[int]) -> Iterator[Item]:
        """Items of at most `max_length` inputs; a long context loses its oldest tokens."""
        if len(continuation) > self.max_length:
            yield from self._rolling(context[-1], continuation)
        elif continuation:
            yield Item((context + continuation)[-self.max_length - 1 : -1], continuation)

    def _rolling_windows(self, text: str) -> Iterator[Item]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        return self._rolling(self.prefix_token_id, tokens)

    def _rolling(self, first: int, tokens: list[int]) -> Iterator[Item]:
        windows = get_rolling_token_windows(tokens, first, self.max_length, context_len=1)
        for context, targets in map(make_disjoint_window, windows):
            yield Item((context + targets)[:-1], targets)

    def _score_windows(self, windows: list[list[Item]], what: str) -> list[Score]:
        """One `Score` for each list of items: sums of log-probabilities; greedy if all are."""
        scores = iter(self.scorer.score([item for group in windows for item in group], what))
        parts = [[next(scores) for _ in group] for group in windows]
        return [
            Score(sum(part.logprob for part in group), all(part.greedy for part in group)) for group in parts
        ]

    # --- generation -------------------------------------------------------------------------------

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        settings = normalize_gen_kwargs(options)
        unknown = sorted(set(settings) - _GENERATION_OPTIONS)
        if unknown:
            raise UserError(
                f"the task asks for generation options {', '.join(unknown)}, which are not "
                f"supported; allowed: {', '.join(sorted(_GENERATION_OPTIONS))}. Leave the task out "
                f"or change its generation_kwargs"
            )
        max_new, stops = settings["max_gen_toks"], settings["until"]
        # A long prompt leaves room for the answer, or half the sequence where that is less.
        longest = self.max_length - min(max_new, self.max_length // 2)
        generated = self.scorer.generate(
            [self.tok_encode(text)[-longest:] for text in contexts],
            max_new=max_new,
            max_length=self.max_length,
            done=lambda new: new[-1] == self.eot_token_id or self._has_stop(new, stops),
            temperature=settings.get("temperature", 0.0),
            what="generate_until",
        )
        return [postprocess_generated_text(self._text(new), stops, None) for new in generated]

    def _has_stop(self, new: list[int], stops: list[str]) -> bool:
        text = self._text(new)
        return any(stop in text for stop in stops if stop)

    def _text(self, new: list[int]) -> str:
        return self.tokenizer.detokenize([t for t in new if t != self.eot_token_id])

    @property
    def _is_silent(self) -> bool:
        return self.scorer.rank != 0


def prefix_token(tokenizer: TextTokenizer) -> int:
    """The tokenizer's BOS, or its end-of-document token when it has none."""
    try:
        bos = tokenizer.bos
    except (AttributeError, NotImplementedError):
        bos = None
    return tokenizer.eod if bos is None or bos < 0 else bos
