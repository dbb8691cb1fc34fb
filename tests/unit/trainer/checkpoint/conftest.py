"""Fixtures of the tests of checkpoints."""

from tests.unit.trainer.checkpoint.resumed_runs import runs, whole_run  # noqa: F401
