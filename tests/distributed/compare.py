"""The comparison of a run with the run of one process: what is allowed, and what is said when it fails."""

from __future__ import annotations

from tests.distributed.record import Run

# Norm-relative. fp32 sums in another order give about 1e-6 at worst; a gradient that lacks one of two
# ranks' parts is off by about 0.5.
TOLERANCE = 1e-5


def differences(run: Run, reference: Run) -> list[str]:
    """Everything in which `run` is not the same training as `reference`; empty when nothing is."""
    return [
        *_differing_tensors(run, reference, "initial", 0.0),
        *differing_gradients(run, reference),
        *_differing_series(run, reference, "losses"),
        *_differing_series(run, reference, "grad_norms"),
        *_differing_tensors(run, reference, "final", TOLERANCE),
    ]


def differing_gradients(run: Run, reference: Run) -> list[str]:
    """The parameters whose first gradient, on any rank, is not the reference's."""
    return _differing_tensors(run, reference, "gradient", TOLERANCE)


def _differing_tensors(run: Run, reference: Run, part: str, allowed: float) -> list[str]:
    errors = run.errors(part, reference)
    return [f"{part} of {name}: off by {error:.2g}" for name, error in errors.items() if error > allowed]


def _differing_series(run: Run, reference: Run, what: str) -> list[str]:
    found, expected = run.series(what), reference.series(what)
    assert len(found) == len(expected), f"{run.name}: {len(found)} {what} for {len(expected)}"
    return [
        f"{what} of step {step}: {a!r} for {b!r}"
        for step, (a, b) in enumerate(zip(found, expected, strict=True), start=1)
        if not abs(a - b) <= TOLERANCE * abs(b)
    ]
