"""The lm-eval model `megatron_dyt`: a Megatron GPT model behind lm-eval's interface.

lm-eval sees one rank (`world_size` 1), so every process builds all requests; `Scorer` and `Generator`
divide the batches over the data-parallel ranks and give every process all results.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Built-in models register themselves only into an empty registry: theirs first, then ours.
import lm_eval.models  # noqa: F401
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from megatron_dyt.cpu import device
from megatron_dyt.errors import UserError
from megatron_dyt.evaluation.attention import hidden_size_to_share
from megatron_dyt.evaluation.batches import DEFAULT_BATCH_TOKENS, Item
from megatron_dyt.evaluation.cache import ResultCache, key_of
from megatron_dyt.evaluation.checkpoint_model import LoadedModel, TextTokenizer, load_model, prefix_token
from megatron_dyt.evaluation.forward import Forward
from megatron_dyt.evaluation.generation import Generator, check_options
from megatron_dyt.evaluation.ranks import Ranks
from megatron_dyt.evaluation.scoring import Score, Scorer

_log = logging.getLogger(__name__)

_LOAD_OPTIONS = ("load", "ckpt_step", "tokenizer_model", "tensor_parallel", "bos")
_RUN_OPTIONS = ("mode", "batch_tokens", "cache", "max_length")


@register_model("megatron_dyt")
class MegatronDyTLM(TemplateLM):
    """Scores lm-eval's requests with `scorer`; texts of more than `max_length` tokens are windowed.

    Contexts start with `prefix`: by default the tokenizer's BOS, or its end-of-document token when it has
    no BOS. `loaded` is the checkpoint's model, for one that was made by `of`.
    """

    loaded: LoadedModel | None = None

    def __init__(
        self, scorer: Scorer, tokenizer: TextTokenizer, *, max_length: int, prefix: int | None = None
    ) -> None:
        super().__init__()
        self.scorer = scorer
        self.generator = Generator(scorer.forward, batch_tokens=scorer.batch_tokens, ranks=scorer.ranks)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._prefix_token = prefix_token(tokenizer) if prefix is None else prefix
        # A document's requests follow each other and repeat its context.
        self._tokens = functools.lru_cache(maxsize=64)(lambda text: tuple(tokenizer.tokenize(text)))

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        *,
        mode: str = "auto",
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        cache: str | Path | None = None,
        max_length: int | None = None,
    ) -> MegatronDyTLM:
        """The lm-eval model of a checkpoint's model.

        Args:
            mode: "shared" computes common contexts once, "flat" each sequence alone, "auto" shares where
                the model allows it.
            batch_tokens: tokens in one forward pass, padding included.
            cache: directory for results, which later runs take from there.
            max_length: tokens of a sequence; the model's by default.

        Raises:
            UserError: an unknown mode, a model that cannot share, a `max_length` above the model's, or a
                cache that cannot be used.
        """
        from megatron.core import mpu

        ranks = Ranks(mpu.get_data_parallel_group())
        scorer = Scorer(
            Forward(
                loaded.model,
                vocab_size=loaded.tokenizer.vocab_size,
                device=next(loaded.model.parameters()).device,
            ),
            batch_tokens=batch_tokens,
            ranks=ranks,
            share=hidden_size_to_share(loaded.model, mode),
            cache=_open_cache(cache, loaded, ranks),
        )
        length = _checked_length(max_length, loaded)
        lm = cls(scorer, loaded.tokenizer, max_length=length, prefix=loaded.prefix_token)
        lm.loaded = loaded
        return lm

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> MegatronDyTLM:
        """For lm-eval's own command line: `--model megatron_dyt --model_args load=DIR,...`.

        The arguments are those of `checkpoint_model.load_model` and of `of`. Of lm-eval's own
        `additional_config` the device applies; batches are sized by tokens, so a batch size does not.
        """
        unknown = sorted(set(arg_dict) - {*_LOAD_OPTIONS, *_RUN_OPTIONS})
        if unknown or "load" not in arg_dict:
            raise UserError(
                f"--model_args {', '.join(unknown) or 'without load'} for the model megatron_dyt: "
                f"load=DIR is needed; allowed are {', '.join((*_LOAD_OPTIONS, *_RUN_OPTIONS))}"
            )
        chosen = (additional_config or {}).get("device")
        device.activate(["--device", chosen.partition(":")[0]] if chosen else [])
        loaded = load_model(**{name: arg_dict[name] for name in _LOAD_OPTIONS if name in arg_dict})
        return cls.of(loaded, **{name: arg_dict[name] for name in _RUN_OPTIONS if name in arg_dict})

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
        tokens = list(self._tokens(string))
        return tokens if add_special_tokens is False else [self.prefix_token_id, *tokens]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of each request's continuation after its context."""
        silent = disable_tqdm or not self.scorer.ranks.reports
        return super().loglikelihood(requests, disable_tqdm=silent)

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
        longer = sum(len(context) + len(tokens) > self.max_length + 1 for _, context, tokens in requests)
        if longer:
            _log.info(
                f"{longer} of {len(requests)} requests are longer than {self.max_length} tokens; their "
                f"contexts lose the oldest"
            )
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
        check_options(settings)
        max_new, stops = settings["max_gen_toks"], settings["until"]
        # A long prompt leaves room for the answer, or half the sequence where that is less.
        longest = self.max_length - min(max_new, self.max_length // 2)
        prompts = [self.tok_encode(text)[-longest:] for text in contexts]
        ends = {self.eot_token_id, *self._special_tokens(stops)}
        temperature = settings.get("temperature", 0.0)
        # What is sampled depends on more than the prompt: it is not kept.
        keys = [key_of("generate", prompt, max_new, stops, self.max_length) for prompt in prompts]
        known = {} if temperature else self.scorer.recall(keys)
        todo = [i for i, key in enumerate(keys) if key not in known]

        def keep(done: dict[int, list[int]]) -> None:
            if not temperature:
                self.scorer.keep({keys[todo[place]]: tokens for place, tokens in done.items()})

        generated = self.generator.generate(
            [prompts[i] for i in todo],
            max_new=max_new,
            max_length=self.max_length,
            done=lambda new: new[-1] in ends or self._has_stop(new, stops),
            temperature=temperature,
            what="generate_until",
            keep=keep,
        )
        if temperature:  # Equal prompts have samples of their own.
            return [self._answer(tokens, stops) for tokens in generated]
        new = {keys[i]: tokens for i, tokens in zip(todo, generated, strict=True)}
        return [self._answer((known | new)[key], stops) for key in keys]

    def _answer(self, new: list[int], stops: list[str]) -> str:
        return postprocess_generated_text(self._text(new), stops, None)

    def _special_tokens(self, stops: list[str]) -> list[int]:
        """Those of `stops` that are special tokens: they leave no trace in a text."""
        encoded = [self.tok_encode(stop, add_special_tokens=False) for stop in stops]
        return [ids[0] for ids in encoded if len(ids) == 1 and not self.tokenizer.detokenize(ids)]

    def _has_stop(self, new: list[int], stops: list[str]) -> bool:
        text = self._text(new)
        return any(stop in text for stop in stops if stop)

    def _text(self, new: list[int]) -> str:
        return self.tokenizer.detokenize([t for t in new if t != self.eot_token_id])


def _checked_length(wanted: int | None, loaded: LoadedModel) -> int:
    longest: int = loaded.args.seq_length
    if wanted is not None and not 1 <= wanted <= longest:
        raise UserError(
            f"a length of {wanted} was given; the model in {loaded.checkpoint.directory} was trained on "
            f"sequences of {longest}. Give 1 to {longest}, or leave it out"
        )
    return wanted or longest


def _open_cache(directory: str | Path | None, loaded: LoadedModel, ranks: Ranks) -> ResultCache | None:
    """One process opens the file; the others receive the results from it."""
    if directory is None:
        return None
    cache = ResultCache(Path(directory), loaded.identity())
    if ranks.reports:
        cache.check()
    return cache
