#!/usr/bin/env bash
# megatron-core 0.19.2: a GPT with multi-token prediction (--mtp-num-layers 1), tied embeddings and two pipeline stages
# trains and cannot be saved. The last stage has the embedding's weight for the prediction layer; its output layer
# has a weight too, and `tie_embeddings_and_output_weights_state_dict` asserts that it has none ("output layer will not
# have any weight"). So a run ends at its first checkpoint, in an assertion whose text is the list of its parameters.
# 0.16.1, 0.17.1 and 0.18.2 have the same assertion (seen with PyTorch 2.11.0, 2026-11-28):
#
#   tied: AssertionError in tie_embeddings_and_output_weights_state_dict
#   untied: saved
#
# Exits with 0 while that is so. Installs into a temporary folder (3 GB); PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uv==0.13.9
"$folder/venv/bin/uv" pip install --quiet --python "$folder/venv/bin/python" torch==2.11.0 megatron-core==0.19.2
cat > "$folder/last_stage.py" <<'END'
import sys
import traceback

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

# Building a model and the list of what is saved takes no GPU, and of two stages only the last.
torch.cuda.current_device = lambda: torch.device("cpu")
torch.Tensor.cuda = lambda tensor, *_, **__: tensor
dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.transformer import TransformerConfig

parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2, create_gloo_process_groups=False)
config = TransformerConfig(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=1,
    pipeline_model_parallel_size=2,
    pipeline_dtype=torch.float32,
    mtp_num_layers=1,
    use_cpu_initialization=True,
)
layer = get_gpt_layer_local_spec()
model = GPTModel(
    config,
    layer,
    vocab_size=16,
    max_sequence_length=8,
    pre_process=False,
    share_embeddings_and_output_weights=sys.argv[1] == "tied",
    mtp_block_spec=get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False),
)
try:
    model.sharded_state_dict(metadata={})
    print(f"{sys.argv[1]}: saved")
except AssertionError as error:
    print(f"{sys.argv[1]}: AssertionError in {traceback.extract_tb(error.__traceback__)[-1].name}")
END
for kind in tied untied; do "$folder/venv/bin/python" -W ignore "$folder/last_stage.py" "$kind" 2>/dev/null; done | tee "$folder/seen"
diff "$folder/seen" - <<'END'
tied: AssertionError in tie_embeddings_and_output_weights_state_dict
untied: saved
END
