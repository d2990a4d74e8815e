"""What methods will cost on a problem, before they run."""

from hypergrad.costs.estimate import Cost, Estimate, Estimates, estimate

__all__ = ["Cost", "Estimate", "Estimates", "estimate"]
