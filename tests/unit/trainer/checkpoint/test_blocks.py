"""Blocks of tensors: whatever cut them, whoever reads them gets the tensor."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from services.errors import StartupError
from trainer.checkpoint.block import Block
from trainer.checkpoint.plain_values import NotPlainError, from_json, to_json
from trainer.checkpoint.rank_file import RankFiles, write_rank_file


def cut(rows: int, columns: int, num_ranks: int) -> Iterator[Block]:
    """As fully_shard cuts dimension 0: the last ranks may have less, or nothing."""
    size = -(-rows // num_ranks)
    for rank in range(num_ranks):
        start = min(rank * size, rows)
        yield Block((rows, columns), (start, 0), (min(size, rows - start), columns))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 9), writers=st.integers(1, 5), readers=st.integers(1, 5))
def test_what_one_number_of_ranks_has_written_another_number_reads(
    rows: int, writers: int, readers: int, tmp_path: Path
) -> None:
    tensor = torch.arange(rows * 2.0).view(rows, 2)
    paths = []
    for rank, block in enumerate(cut(rows, 2, writers)):
        part = tensor[block.offset[0] : block.offset[0] + block.shape[0]]
        paths.append(tmp_path / f"rank-{rank}.safetensors")
        write_rank_file(paths[-1], {"t": part}, {"t": block})
    files = RankFiles(paths)
    assert torch.equal(files.read("t"), tensor)
    read = [files.read("t", block) for block in cut(rows, 2, readers)]
    assert torch.equal(torch.cat(read), tensor)


def test_a_part_that_is_missing_is_no_tensor_of_zeros(tmp_path: Path) -> None:
    first, _ = cut(4, 2, 2)
    write_rank_file(tmp_path / "rank-0.safetensors", {"t": torch.ones(2, 2)}, {"t": first})
    files = RankFiles([tmp_path / "rank-0.safetensors"])
    with pytest.raises(StartupError, match="holds 4 of 8 values of t"):
        files.read("t")
    with pytest.raises(StartupError, match=r"holds t with shape \[4, 2\], not \[5, 2\]"):
        files.read("t", Block.all_of((5, 2)))
    with pytest.raises(StartupError, match="holds no u; it is of another student"):
        files.read("u")


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04\x95" + bytes(40)])
def test_a_file_that_is_none_is_refused_by_its_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rank-0.safetensors"
    path.write_bytes(content)
    with pytest.raises(StartupError, match=f"{path} cannot be read"):
        RankFiles([path])


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=True) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(PLAIN)
def test_plain_values_are_the_same_of_the_same_types(value: object) -> None:
    again = from_json(json.loads(json.dumps(to_json(value))))
    assert again == value and repr(again) == repr(value)


def test_what_is_no_number_stays_so() -> None:
    assert math.isnan(from_json(json.loads(json.dumps(to_json(math.nan), allow_nan=False))))


@pytest.mark.parametrize(
    "value",
    [{1}, object(), len, [b"x"], {"a": torch.zeros(1)}, ({"b": [{2}]},)],
    ids=["set", "object", "function", "bytes in a list", "tensor", "set far inside"],
)
def test_what_is_not_plain_is_refused(value: object) -> None:
    with pytest.raises(NotPlainError, match=r"^a "):
        to_json(value)
