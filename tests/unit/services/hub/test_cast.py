"""Weights in another dtype: the same tensors, a file at a time, and nothing that the dtype cannot hold."""

import json
import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.errors import DataError, OutputError
from services.hub import cast as cast_module
from services.hub.cast import Cast, plan_cast, with_dtype


def written(cast: Cast | None, folder: Path) -> list[tuple[int, int]]:
    assert cast is not None
    folder.mkdir()
    told: list[tuple[int, int]] = []
    cast.write(folder, lambda number, count: told.append((number, count)))
    return told


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two shards of four float32 tensors of 4 kB, an integer and a boolean beside them."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(32, 32) for name in "abcd"}
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(
        {"a": tensors["a"], "b": tensors["b"], "ids": torch.arange(5)}, folder / "model-00001-of-00002.safetensors"
    )
    save_file(
        {"c": tensors["c"], "d": tensors["d"], "mask": torch.tensor([True])},
        folder / "model-00002-of-00002.safetensors",
    )
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_weight_is_rounded_and_everything_else_as_it_was(dtype: str, source: Path, tmp_path: Path) -> None:
    cast = plan_cast(sorted(source.iterdir()), dtype)
    assert written(cast, tmp_path / "made") == [(1, 1)]
    made, before = tensors_in(tmp_path / "made"), tensors_in(source)
    assert made.keys() == before.keys()
    for name in "abcd":
        assert torch.equal(made[name], before[name].to(getattr(torch, dtype)))
    assert torch.equal(made["ids"], before["ids"]) and torch.equal(made["mask"], before["mask"])


def test_files_are_no_larger_than_asked_and_the_index_finds_each_tensor(source: Path, tmp_path: Path) -> None:
    cast = plan_cast(sorted(source.iterdir()), "bfloat16", max_shard_bytes=4500)
    assert written(cast, tmp_path / "made") == [(1, 2), (2, 2)] and cast is not None
    made = tmp_path / "made"
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(tensors_in(source))
    assert index["metadata"]["total_size"] == 4 * 2048 + 5 * 8 + 1
    for name, file in index["weight_map"].items():
        assert name in load_file(made / file)
    for name, size in cast.sizes.items():
        assert size <= 4500 and 0 < (made / name).stat().st_size - size < 1000


def test_one_file_of_the_copy_is_in_memory_at_a_time(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def save(tensors: dict[str, torch.Tensor], path: Path, **_: object) -> None:
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path)

    monkeypatch.setattr(cast_module, "save_file", save)
    written(plan_cast(sorted(source.iterdir()), "bfloat16", max_shard_bytes=2100), tmp_path / "made")
    assert len(held) == 4 and max(held) <= 2100


def test_weights_that_have_the_dtype_are_not_copied(source: Path) -> None:
    assert plan_cast(sorted(source.iterdir()), "float32") is None


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [("float16", -70000.0, r"7e\+04, more than float16 can \(65504\)"), ("bfloat16", 3.4e38, "more than bfloat16 can")],
)
def test_a_weight_that_the_dtype_cannot_hold_is_refused(
    dtype: str, value: float, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"fine": torch.tensor([1.0, math.inf, math.nan]), "large": torch.tensor([value])}, path)
    with pytest.raises(DataError, match=f"large holds .*{expected}"):
        written(plan_cast([path], dtype), tmp_path / "made")


def test_float8_weights_keep_their_dtype(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    quantised = torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn)
    save_file({"q": quantised, "w": torch.tensor([1.0])}, path)
    written(plan_cast([path], "bfloat16"), tmp_path / "made")
    assert tensors_in(tmp_path / "made")["q"].dtype == torch.float8_e4m3fn


def test_an_adapter_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({"w": torch.tensor([1.0])}, path)
    written(plan_cast([path], "bfloat16"), tmp_path / "made")
    assert [made.name for made in (tmp_path / "made").iterdir()] == ["adapter_model.safetensors"]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cast_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(OutputError, match=r"1 MiB left, the copy in bfloat16 needs 1 MiB"):
        written(plan_cast(sorted(source.iterdir()), "bfloat16"), tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())


def test_a_file_that_cannot_grow_is_one_line(source: Path, tmp_path: Path) -> None:
    cast = plan_cast(sorted(source.iterdir()), "bfloat16")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"model\.safetensors cannot be written: .*; free some"):
            written(cast, tmp_path / "made")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "spoil", [lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: path.write_text("no"), Path.unlink]
)
def test_a_damaged_file_is_named(spoil: Callable[[Path], None], source: Path, tmp_path: Path) -> None:
    damaged = shutil.copy(source / "model-00001-of-00002.safetensors", tmp_path / "model.safetensors")
    spoil(Path(damaged))
    with pytest.raises(DataError, match=r"model\.safetensors cannot be read"):
        plan_cast([Path(damaged)], "bfloat16")


def test_every_dtype_in_a_configuration_is_the_new_one() -> None:
    config = {"dtype": "float32", "text_config": {"torch_dtype": "float32", "x": [1]}, "vision": {"dtype": None}}
    expected = {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "x": [1]}, "vision": {"dtype": None}}
    assert with_dtype(config, "bfloat16") == expected
