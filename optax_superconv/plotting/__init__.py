"""What do the dials look like, and what do the finders see?

Needs matplotlib (``pip install 'optax-superconv[plot]'``), imported when first used.
"""

from optax_superconv.plotting._auto_onecycle import plot_auto
from optax_superconv.plotting._dials import plot_schedule
from optax_superconv.plotting._grid_test import plot_grid
from optax_superconv.plotting._range_test import plot_range_test
from optax_superconv.plotting._threshold import plot_threshold

__all__ = [
    "plot_auto",
    "plot_grid",
    "plot_range_test",
    "plot_schedule",
    "plot_threshold",
]
