"""What the norms of a model do to their input: `measure` takes any torch model.

The other modules are `megatron-dyt probe`: language models from checkpoints, tables and figures.
"""

from megatron_dyt.probe.measure import Measurement, SiteMeasurement, measure

__all__ = ["Measurement", "SiteMeasurement", "measure"]
