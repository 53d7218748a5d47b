"""Look at a freeze mask, and prove what it kept."""

from ._audit import audit as audit
from ._metrics import metrics as metrics
from ._plot import plot as plot
from ._snapshot import snapshot as snapshot
from ._summary import summary as summary

__all__ = [
  "audit",
  "metrics",
  "plot",
  "snapshot",
  "summary",
]
