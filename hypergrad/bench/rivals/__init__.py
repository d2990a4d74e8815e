"""The libraries that the benchmark compares with, each run by an interpreter of its own."""
