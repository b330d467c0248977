"""Classification with a ViT (Table 1): transformers' ViTForImageClassification, 0.2M parameters."""

from transformers import ViTConfig, ViTForImageClassification

from examples.beyond_llm import digits
from examples.beyond_llm.domain import Domain

SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}


def model() -> ViTForImageClassification:
    # A start of unit variance, for both norms: DyT does not rescale its input (docs/initial-scale.md).
    start = {"initializer_range": SHAPE["hidden_size"] ** -0.5}
    image = {"image_size": digits.IMAGE, "patch_size": 2, "num_channels": 1, "num_labels": digits.CLASSES}
    made = ViTForImageClassification(ViTConfig(**SHAPE, **start, **image))
    digits.unit_variance(made.vit.embeddings, start["initializer_range"])
    return made


DOMAIN = Domain(
    title="ViT, classification of digits",
    metrics={"accuracy": ("%", True)},
    model=model,
    data=digits.read,
    loss=digits.cross_entropy,
    evaluate=digits.accuracy,
)
