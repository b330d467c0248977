"""A linear classifier, by which frozen features are judged."""

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


def linear_probe() -> Pipeline:
    """Of scaled features: unscaled ones favour those behind a norm (docs/beyond-llm.md)."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
