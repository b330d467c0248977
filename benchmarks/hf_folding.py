"""What `export --fold-weight` saves in a forward pass on a CPU: python benchmarks/hf_folding.py

The modules of an exported DyT LLaMA, with DyT's weights and the embedding's scale on their own and folded,
and a LLaMA with RMSNorm, in turn in one process: a pass over a prompt, and one over the token behind it.
Weights are random: what the models compute differs, what it costs does not. Prints medians of CPU time, and
those over what is not folded.
"""

import argparse
import statistics
import time

import torch
from common_report import markdown_table
from common_timing import in_turn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from megatron_dyt.hf.modeling_llama_dyt import LlamaDyTConfig, LlamaDyTForCausalLM

PROMPT = 512


def make_models(layers: int, hidden: int) -> dict[str, torch.nn.Module]:
    shape = {
        **{"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers},
        **{"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "vocab_size": 4096},
    }
    folded = {"dyt_folded": ["attn", "ffn", "final"], "embedding_scale": None}
    return {
        "DyT": LlamaDyTForCausalLM(LlamaDyTConfig(**shape)).eval(),
        "DyT, folded": LlamaDyTForCausalLM(LlamaDyTConfig(**shape, **folded)).eval(),
        "RMSNorm": LlamaForCausalLM(LlamaConfig(**shape)).eval(),
    }


@torch.inference_mode()
def measure(models: dict[str, torch.nn.Module], rounds: int) -> dict[str, list[list[float]]]:
    """Model -> CPU seconds of a pass over the prompt, and of one over the token behind it, by round."""
    tokens = torch.randint(4096, (1, PROMPT + 1))
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in models}
    for name, model, counts in in_turn(models, rounds, 2):
        cache = DynamicCache(config=model.config)
        for part, into in zip((tokens[:, :-1], tokens[:, -1:]), seconds[name], strict=True):
            start = time.process_time()
            model(part, past_key_values=cache, use_cache=True)
            if counts:
                into.append(time.process_time() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    medians = {
        name: [statistics.median(part) for part in parts]
        for name, parts in measure(make_models(options.layers, options.hidden), options.rounds).items()
    }
    rows = [
        [
            name,
            *(f"{1e3 * own:.1f} ms, {own / dyt:.3f}" for own, dyt in zip(parts, medians["DyT"], strict=True)),
        ]
        for name, parts in medians.items()
    ]
    print(
        markdown_table(
            (f"{options.layers} layers, hidden {options.hidden}", f"{PROMPT} tokens", "one token"), rows
        )
    )


if __name__ == "__main__":
    main()
