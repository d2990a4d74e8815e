"""Whether a hypergradient means anything, measured."""

from hypergrad.diagnosis._comparison import Agreement
from hypergrad.diagnosis.diagnose import Diagnoses, Diagnosis, diagnose

__all__ = ["Agreement", "Diagnoses", "Diagnosis", "diagnose"]
