"""Run by `test_vllm.py` in the environment of vLLM: scores and greedy tokens of an exported model as JSON."""

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(directory: str, tensor_parallel: str, new_tokens: str, prompts: str, output: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=directory,
        trust_remote_code=True,
        skip_tokenizer_init=True,
        tensor_parallel_size=int(tensor_parallel),
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.3,  # Of the machine's memory.
    )
    ask = SamplingParams(
        temperature=0, max_tokens=int(new_tokens), ignore_eos=True, prompt_logprobs=1, detokenize=False
    )
    answers = []
    for answer in llm.generate([{"prompt_token_ids": prompt} for prompt in json.loads(prompts)], ask):
        scored = zip(answer.prompt_logprobs[1:], answer.prompt_token_ids[1:], strict=True)
        answers.append(
            {
                "scores": [of_token[token].logprob for of_token, token in scored],
                "tokens": list(answer.outputs[0].token_ids),
            }
        )
    with open(output, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
