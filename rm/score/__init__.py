"""Scoring from Python: `from rm.score import load_scorer`."""

from rm.score.scorer import Scorer as load_scorer  # noqa: F401
