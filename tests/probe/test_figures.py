"""The values that figures of a probe show, computed a second time by NumPy."""

import numpy as np
import pytest
import torch

from megatron_dyt.nn import DynamicTanh
from megatron_dyt.probe import measure
from megatron_dyt.probe.figures import BY_TOKEN, alpha_figure, map_figure, profile_figure
from megatron_dyt.probe.history import of_sites
from tests.probe.test_measure import Model, batch

ALPHAS = (0.4, -1.2)


def nearest_alpha(x: np.ndarray, y: np.ndarray) -> float:
    """Of the gamma * tanh(alpha * x) that leaves the least of y, over a grid."""
    grid = np.geomspace(0.01, 10, 1000)
    curves = np.tanh(np.multiply.outer(grid, x))
    return float(grid[((curves @ y) ** 2 / (curves**2).sum(1)).argmax()])


def test_alpha_std_of_all_sites_is_alpha_times_the_std_of_their_input() -> None:
    model = Model(DynamicTanh(32), DynamicTanh(32))
    for layer, alpha in zip(model.layers, ALPHAS, strict=True):
        layer.norm.alpha.data.fill_(alpha)
    norms, inputs = [model.layers[0].norm, model.layers[1].norm, model.last], []
    x = 3 * batch() * torch.logspace(-0.5, 0.5, 40)[:, None] + 1
    handles = [norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for norm in norms]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    flat = [each.numpy().astype(np.float64).ravel() for each in inputs]
    rms = np.sqrt((inputs[2].numpy().astype(np.float64) ** 2).mean(-1, keepdims=True))
    alphas = [*np.abs(ALPHAS), nearest_alpha(flat[2], (inputs[2].numpy() / rms).ravel())]
    stds = [float(np.sqrt(((each - each.mean()) ** 2).mean())) for each in flat]
    expected = [alpha * std for alpha, std in zip(alphas, stds, strict=True)]

    found = measure(model, x)
    assert [site.alpha_std for site in found.sites] == pytest.approx(expected, rel=0.01)
    now = of_sites(found.sites, 1)
    assert [moment.alpha_std for moment in now] == pytest.approx(expected, rel=0.01)
    # By layer, the norm outside of them last; and on each map.
    panel = next(axes for axes in profile_figure(found).axes if axes.get_title("left") == "α · std")
    lines = {tuple(line.get_xdata()): list(line.get_ydata()) for line in panel.lines}
    assert lines[1, 2] == pytest.approx(expected[:2], rel=0.01)
    assert lines[3,] == pytest.approx(expected[2:], rel=0.01)
    texts = [text.get_text() for axes in map_figure(found.sites, BY_TOKEN).axes for text in axes.texts]
    said = [float(text.split("\n")[0].removeprefix("α·std ")) for text in texts]
    assert said == pytest.approx(expected, rel=0.06)  # Two digits.
    # Alpha against 1/std, and the line of their median product.
    axes = alpha_figure(found.sites, now, now).axes[0]
    *places, line = axes.lines
    points = np.concatenate([place.get_xydata() for place in places])
    assert points[:, 0] == pytest.approx(1 / np.array(stds), rel=1e-4)
    assert points[:, 1] == pytest.approx(alphas, rel=0.01)
    assert line.get_ydata() / line.get_xdata() == pytest.approx(np.median(expected), rel=0.01)
