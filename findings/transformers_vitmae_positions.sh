#!/usr/bin/env bash
# transformers: a ViTMAEForPreTraining that is made from its config, to be trained from scratch, has positions of zero. The
# sines and cosines that belong there are lost as the weights are initialized. The tables are frozen, so
# they stay zero: no patch has a place, and the decoder cannot tell one masked patch from another. No error, no warning; a
# checkpoint brings its own. model.decoder.initialize_weights(number of patches) brings the decoder's back; the same method
# of the embeddings does nothing while the patch projection is marked as initialized (_is_hf_initialized, 5.24.0).
# Largest position (seen with torch 2.13.0, 2026-11-29):
#
#   4.44.2: encoder 1.0, decoder 1.0, trained: False
#   4.57.1: encoder 1.0, decoder 0.0, trained: False
#   5.24.0: encoder 0.0, decoder 0.0, trained: False
#
# Exits with 0 while that is so. Installs into a temporary folder; PYTHON chooses the interpreter.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$folder/try.py" <<'END'
import sys

import transformers
from transformers import ViTMAEConfig, ViTMAEForPreTraining

small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
config = ViTMAEConfig(image_size=8, patch_size=2, num_channels=1, **small,
                      **{f"decoder_{name}": value for name, value in small.items()})
model = ViTMAEForPreTraining(config)
tables = model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed
encoder, decoder = (table.abs().max().item() for table in tables)
print(f"{transformers.__version__}: encoder {encoder}, decoder {decoder}, "
      f"trained: {any(table.requires_grad for table in tables)}")
raise SystemExit(f"{encoder} {decoder}" != " ".join(sys.argv[1:]))
END
for each in "4.44.2 1.0 1.0" "4.57.1 1.0 0.0" "5.24.0 0.0 0.0"; do
    read -r version expected <<< "$each"
    "$folder/venv/bin/pip" install --quiet --target "$folder/$version" "transformers==$version" numpy==2.3.5
    # shellcheck disable=SC2086  # two numbers
    PYTHONPATH=$folder/$version "$folder/venv/bin/python" "$folder/try.py" $expected
done
