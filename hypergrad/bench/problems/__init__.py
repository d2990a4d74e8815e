"""Bilevel problems for the benchmark, one file each, on torch and NumPy alone, for any interpreter to load."""
