"""Hypergradient methods, one file each, and the two functions that apply them."""

from hypergrad.methods.amigo import AmIGO
from hypergrad.methods.base import Method, Pulled, ResponseMethod, Total
from hypergrad.methods.bome import BOME
from hypergrad.methods.evaluate import Hypergradient, best_response, hypergradient
from hypergrad.methods.f2sa import F2SA
from hypergrad.methods.finite_difference import FiniteDifference
from hypergrad.methods.implicit import Implicit
from hypergrad.methods.one_step import OneStep
from hypergrad.methods.penalty import Penalty
from hypergrad.methods.reptile import Reptile
from hypergrad.methods.sama import SAMA
from hypergrad.methods.soba import SOBA
from hypergrad.methods.stocbio import StocBiO
from hypergrad.methods.unrolled import ForwardUnrolled, Unrolled

__all__ = [
    "StocBiO",
    "SOBA",
    "F2SA",
    "BOME",
    "AmIGO",
    "SAMA",
    "FiniteDifference",
    "ForwardUnrolled",
    "Hypergradient",
    "Implicit",
    "Method",
    "OneStep",
    "Penalty",
    "Pulled",
    "Reptile",
    "ResponseMethod",
    "Total",
    "Unrolled",
    "best_response",
    "hypergradient",
]
