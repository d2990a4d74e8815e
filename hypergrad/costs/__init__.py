"""What methods will cost on a problem, before they run."""

from hypergrad.costs._table import Cost, Estimate, Estimates
from hypergrad.costs.estimate import estimate

__all__ = ["Cost", "Estimate", "Estimates", "estimate"]
