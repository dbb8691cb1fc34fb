"""The examples in docstrings of the Python interface."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module", ["trainer.callbacks.callback", "trainer.distillation_trainer", "trainer.own_optimizers"]
)
def test_the_examples_of_a_module_say_what_happens(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted > 0 and found.failed == 0
