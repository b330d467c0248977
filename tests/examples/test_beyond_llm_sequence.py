"""Speech and DNA: their data, and the models that this project writes itself."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from examples.beyond_llm import genome, speech
from examples.beyond_llm import run as frame
from megatron_dyt.errors import UserError
from tests.examples import made_up

pytest.importorskip("sklearn")


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    made_up.install(monkeypatch, tmp_path)
    return tmp_path


def made(name: str, norm: str) -> torch.nn.Module:
    return frame.start(frame.Run(name, norm, 0.0, 1), frame.load(name))


# --- the genome --------------------------------------------------------------------------------------


def test_windows_are_the_genomes(folder: Path) -> None:
    places = torch.arange(700_000)
    made_up.sequence(folder / "genome.gz", places // 4 ** (places % 9) % 4)
    split = genome.read(100, 500)
    text = "".join(str(base) for base in genome.bases(folder / "genome.gz").tolist())
    assert len(text) == 700_000
    parts = {name: getattr(split, name).inputs for name in ("train", "valid", "test")}
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "train": (500, 2, 100),
        "valid": (128, 2, 100),
        "test": (256, 2, 100),
    }
    starts = [text.find("".join(map(str, row.tolist()))) for part in parts.values() for row in part[:, 0]]
    assert min(starts) >= 0
    ordered = sorted(starts)
    assert min(b - a for a, b in itertools.pairwise(ordered)) >= 100
    # All parts are from all over the genome.
    assert all(part < 700_000 / 4 for part in (min(starts[:500]), min(starts[500:628]), min(starts[628:])))
    assert all(part > 700_000 / 2 for part in (max(starts[:500]), max(starts[500:628]), max(starts[628:])))


def test_decoys_have_the_genomes_triplets_only(folder: Path) -> None:
    # Bases 0 1 0 2 over and over: 0 is followed by 1 or 2, by what stood before it.
    windows = torch.tensor([0, 1, 0, 2]).repeat(200, 25)
    chances = genome.triplets(windows)
    made = genome.decoys(windows, chances, torch.Generator().manual_seed(0))
    triplets = Counter(tuple(row[i : i + 3].tolist()) for row in made for i in range(98))
    common = {(0, 1, 0), (1, 0, 2), (0, 2, 0), (2, 0, 1)}
    assert sum(triplets[each] for each in common) / (200 * 98) == pytest.approx(1, abs=0.01)
    assert not torch.equal(made, windows)
    # Of a sequence without any order the decoys are as even as it is.
    even = torch.randint(4, (500, 100), generator=torch.Generator().manual_seed(1))
    drawn = genome.decoys(even, genome.triplets(even), torch.Generator().manual_seed(2))
    assert torch.bincount(drawn.flatten()) / 50_000 == pytest.approx(0.25, abs=0.01)


def test_unknown_bases_are_left_out(folder: Path) -> None:
    import gzip

    (folder / "few.gz").write_bytes(gzip.compress(b">ACGT\nacgNNt\n>2\nTTnRA\n"))
    assert genome.bases(folder / "few.gz").tolist() == [0, 1, 2, 3, 3, 3, 0]


def test_a_genome_that_is_missing_or_short(folder: Path) -> None:
    with pytest.raises(UserError, match=r"700000 bases, of which 6384 windows of 128 do not fit"):
        genome.read(128, 6000)
    (folder / "genome.gz").unlink()
    with pytest.raises(UserError, match=r"genome.gz: apt-get install bowtie-examples"):
        genome.read(128, 100)


@pytest.mark.skipif(not genome.PATH.exists(), reason="Debian's bowtie-examples is not installed")
def test_the_packages_genome() -> None:
    assert len(genome.bases(genome.PATH)) == 4_938_920


# --- speech ------------------------------------------------------------------------------------------


def test_no_recording_is_in_two_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Each is a tone of its own pitch, whole clips long.
    time = torch.arange(speech.CLIP) / speech.RATE
    for i in range(20):
        tone = torch.sin(2 * torch.pi * 100 * (i + 1) * time)
        made_up.record(tmp_path / f"{i}.wav", tone.repeat(1 + i % 2))
    monkeypatch.setattr(speech, "FOLDER", tmp_path)
    split = speech.read()
    pitches = [
        sorted((torch.fft.rfft(part.inputs).abs().argmax(1) // 200 - 1).tolist())
        for part in (split.train, split.valid, split.test)
    ]
    expected = sorted([*range(20), *range(1, 20, 2)])
    assert sorted(pitch for part in pitches for pitch in part) == expected
    assert [len(set(part)) for part in pitches] == [15, 2, 3]
    assert len(set().union(*pitches)) == 20
    every = torch.cat([split.train.inputs, split.valid.inputs, split.test.inputs])
    torch.testing.assert_close(every.mean(1), torch.zeros(30), rtol=0, atol=1e-4)
    torch.testing.assert_close(every.std(1), torch.ones(30), rtol=1e-3, atol=0)


def test_recordings_that_are_missing_or_other(folder: Path) -> None:
    made_up.record(folder / "0.wav", torch.zeros(9_000), rate=16_000)
    with pytest.raises(UserError, match=r"0.wav has 1 channels of 2 bytes at 16000 Hz.* 1 of 2 at 8000"):
        speech.read()
    for path in folder.glob("*.wav"):
        path.unlink()
    with pytest.raises(UserError, match=r"no \*.wav in .*apt-get install .*asterisk-core-sounds-en-wav"):
        speech.read()


def test_silence_stays_silence() -> None:
    found = speech.clips([torch.full((speech.CLIP + 5,), 0.25)]).inputs
    assert torch.equal(found, torch.zeros(1, speech.CLIP))


def test_all_that_is_drawn_is_the_generators(folder: Path) -> None:
    from examples.beyond_llm import wav2vec2

    model, batch = made("wav2vec2", "DyT").train(), speech.read().valid
    losses = [wav2vec2.loss(model, batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_the_loss_is_of_a_frame(folder: Path) -> None:
    """With all codes alike there is nothing to choose, and what is left is at most 0.1 for diversity."""
    from examples.beyond_llm import wav2vec2

    model = made("wav2vec2", "LayerNorm").eval()
    torch.nn.init.zeros_(model.project_q.weight)
    batch = speech.read().valid
    assert 0 < float(wav2vec2.loss(model, batch, torch.Generator().manual_seed(1)).detach()) < 0.1


# --- HyenaDNA ----------------------------------------------------------------------------------------


def test_the_convolution_is_the_sum() -> None:
    from examples.beyond_llm.hyena import convolve

    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(2, 3, 17, dtype=torch.float64, generator=generator)
    filters = torch.randn(3, 17, dtype=torch.float64, generator=generator)
    expected = torch.zeros_like(signal)
    for t in range(17):
        for s in range(t + 1):
            expected[..., t] += filters[:, s] * signal[..., t - s]
    torch.testing.assert_close(convolve(signal, filters), expected, rtol=0, atol=1e-12)


def test_the_next_base_is_not_seen() -> None:
    model = made("hyena", "DyT").double()
    windows = torch.randint(4, (2, 128), generator=torch.Generator().manual_seed(0))
    changed = windows.clone()
    changed[:, 60] = 3 - changed[:, 60]
    difference = (model(windows) - model(changed)).abs().amax((0, 2))
    assert difference[:60].max() < 1e-12
    # The whole past is: by the long convolution, also beyond the short ones' reach.
    assert difference[60:].min() > 1e-9


def test_a_filter_fades() -> None:
    from examples.beyond_llm.hyena import LENGTH, Filter

    decay = Filter(8, LENGTH).decay
    assert decay[:, 0].tolist() == [1.0] * 8
    torch.testing.assert_close(decay[-1, round(0.3 * (LENGTH - 1))].item(), 0.01, rtol=0.05, atol=0)
    torch.testing.assert_close(decay[0, -1].item(), 100 ** (-1 / 1.5), rtol=1e-5, atol=0)


# --- Caduceus ----------------------------------------------------------------------------------------


def test_both_strands_are_read_alike() -> None:
    """The logits for the reverse complement are those for the complements, from the end to the start."""
    from examples.beyond_llm import caduceus

    model = made("caduceus", "DyT").double()
    windows = torch.randint(5, (3, 20), generator=torch.Generator().manual_seed(0))
    other = caduceus.reverse_complement(windows)
    assert other[0].tolist() == [4 if base == 4 else 3 - base for base in windows[0].tolist()[::-1]]
    torch.testing.assert_close(model(other), model(windows).flip(1, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.features(other), model.features(windows).flip(1), rtol=0, atol=1e-12)
    assert not torch.allclose(model(windows), model(windows.flip(1)).flip(1))


def test_a_mixer_reads_both_ways() -> None:
    mixer = made("caduceus", "DyT").double().mamba.layers[0].mixer
    hidden = torch.randn(1, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    changed = hidden.clone()
    changed[:, 6] += 1
    assert ((mixer(hidden) - mixer(changed)).abs().amax(-1) > 1e-9).all()
    assert mixer.forwards.in_proj is mixer.backwards.in_proj
    assert mixer.forwards.out_proj is mixer.backwards.out_proj
    # What goes along the sequence is each direction's own.
    assert not torch.equal(mixer.forwards.conv1d.weight, mixer.backwards.conv1d.weight)


def test_masked_bases_only_are_guessed() -> None:
    from examples.beyond_llm import caduceus

    seen = []

    def model(windows: torch.Tensor) -> torch.Tensor:
        seen.append(windows)
        return torch.nn.functional.one_hot(windows, 5).float()

    windows = torch.randint(4, (200, 32), generator=torch.Generator().manual_seed(0))
    logits, bases = caduceus.masked(model, windows, torch.Generator().manual_seed(1))
    hidden = seen[0] == 4
    assert torch.equal(logits.argmax(-1), torch.full_like(bases, 4))
    assert torch.equal(bases, windows[hidden])
    assert torch.equal(seen[0][~hidden], windows[~hidden])
    assert float(hidden.float().mean()) == pytest.approx(0.15, abs=0.02)


# --- both --------------------------------------------------------------------------------------------


def test_a_probe_tells_a_genome_from_decoys() -> None:
    from examples.beyond_llm import genome_metrics
    from examples.beyond_llm.domain import Data, Split

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(4, (600, 2, 32), generator=generator)
    inputs[:, 0, ::2] = 2
    data = Data(inputs, inputs[:, 0])
    split = Split(data, data, data)
    one_hot = torch.nn.functional.one_hot
    assert genome_metrics.accuracy(lambda x: one_hot(x, 4).float(), data, split) > 99
    held_out = Data(inputs[512:], inputs[512:, 0])
    noise = genome_metrics.accuracy(lambda x: torch.randn(*x.shape, 4, generator=generator), held_out, split)
    assert 25 < noise < 75
