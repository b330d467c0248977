#!/usr/bin/env bash
# lm-eval 0.4.13: for whole texts (loglikelihood_rolling: wikitext and other perplexities) the model `hf` puts a BOS in
# front, and encodes the text with the tokenizer's own special tokens. A tokenizer that begins with BOS, as LLaMA's,
# then gives BOS BOS text, and the second BOS is scored as if it were text. A LLaMA of zeros, which gives each of
# its 8 tokens the probability 1/8, has -3 ln 8 = -6.238 for three tokens (seen on Python 3.12, 2026-11-28):
#
#   by default             : -8.318, as four tokens
#   with add_bos_token=True: -8.318
#   add_bos_token=False    : -6.238, but then tasks with answers have no BOS
#
# Exits with 0 while that is so. Installs into a temporary folder (torch with what it needs: 6 GB); PYTHON chooses the
# interpreter, 3.12 or 3.13.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv==0.13.9
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" \
    lm-eval==0.4.13 transformers==5.23.0 torch==2.11.0 accelerate==1.15.0 datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'END'
from math import log

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

vocabulary = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e"]
words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=16
)
assert tokenizer("a b c")["input_ids"] == [1, 3, 4, 5]
config = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=16,
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.zero_()
text = Instance("loglikelihood_rolling", {}, ("a b c",), 0, metadata=("task", 0, 1))
tokens = {}
for name, flags in {"by default": {}, "True": {"add_bos_token": True}, "False": {"add_bos_token": False}}.items():
    (score,) = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1, **flags).loglikelihood_rolling([text])
    tokens[name] = -score / log(8)
    print(f"{name}: {score:.3f}, as {tokens[name]:.3f} tokens")
raise SystemExit([round(each) for each in tokens.values()] != [4, 4, 3])
END
