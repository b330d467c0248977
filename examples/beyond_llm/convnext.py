"""Classification with a ConvNeXt (Table 1): transformers' ConvNextForImageClassification, 0.1M parameters."""

from transformers import ConvNextConfig, ConvNextForImageClassification

from examples.beyond_llm import digits
from examples.beyond_llm.domain import Domain

SHAPE = {"num_stages": 2, "hidden_sizes": [32, 64], "depths": [2, 2], "patch_size": 2}


def model() -> ConvNextForImageClassification:
    # A start of unit variance in the narrower stage, for both norms (docs/initial-scale.md).
    start = {"initializer_range": SHAPE["hidden_sizes"][0] ** -0.5}
    image = {"image_size": digits.IMAGE, "num_channels": 1, "num_labels": digits.CLASSES}
    return ConvNextForImageClassification(ConvNextConfig(**SHAPE, **start, **image))


DOMAIN = Domain(
    title="ConvNeXt, classification of digits",
    metrics={"accuracy": ("%", True)},
    model=model,
    data=digits.read,
    loss=digits.cross_entropy,
    evaluate=digits.accuracy,
)
