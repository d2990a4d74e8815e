"""Accuracy against cost: problems, contenders, one measurement for all of them, and a report."""
