"""Classification with a ResNet (Table 16): transformers' ResNetForImageClassification, 0.2M parameters.

The one domain in which the paper's DyT loses, in the place of BatchNorm.
"""

from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from examples.beyond_llm import digits
from examples.beyond_llm.domain import Domain

SHAPE = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "layer_type": "basic"}


def model() -> ResNetForImageClassification:
    config = ResNetConfig(**SHAPE, num_channels=1, num_labels=digits.CLASSES)
    made = ResNetForImageClassification(config)
    # For images of 224 pixels; of 8 it would leave one for the second stage.
    made.resnet.embedder.pooler = nn.Identity()
    return made


DOMAIN = Domain(
    title="ResNet, classification of digits",
    metrics={"accuracy": ("%", True)},
    model=model,
    data=digits.read,
    loss=digits.cross_entropy,
    evaluate=digits.accuracy,
    norm="BatchNorm",
)
