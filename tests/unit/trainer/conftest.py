"""Fixtures of several tests of the trainer."""

from tests.unit.trainer.user_runs import run, teacher  # noqa: F401
