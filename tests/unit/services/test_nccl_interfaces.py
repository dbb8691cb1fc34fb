"""The nccl path is written to what docs/gpu.md says of vLLM and torch; an upgrade that changes any of it must be read."""

from tests.gpu import nccl_interfaces


def test_the_interfaces_that_nccl_uses_are_the_documented_ones() -> None:
    assert nccl_interfaces.table() == nccl_interfaces.documented()
