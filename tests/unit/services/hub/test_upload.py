"""Which files of a student go to the hub, under which names, and what they replace there."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from services.errors import DataError
from services.hub.upload import CARD, plan_upload, replaced


@pytest.fixture
def folder(tiny_model_folder: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder("qwen3"), tmp_path / "student"))


def content(upload: Any, name: str) -> bytes:
    part = upload.files[name]
    return part if isinstance(part, bytes) else part.read_bytes()


def test_weights_configuration_and_tokenizer_go_as_they_are_and_nothing_else(folder: Path) -> None:
    for name in ("notes.log", ".hidden.json", "optimizer.safetensors", "training_args.bin", "README.md"):
        (folder / name).write_text("{}")
    upload = plan_upload(folder, "merged", None, "card")
    expected = {
        *("model.safetensors", "config.json", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", CARD),
    }
    assert upload.names() == set(upload.files) == expected
    assert all(content(upload, name) == (folder / name).read_bytes() for name in expected - {CARD})
    assert content(upload, CARD) == b"card"


def test_templates_in_folders_go_and_an_adapter_in_its_own_does_not(folder: Path) -> None:
    for name in (
        "additional_chat_templates/tool.jinja",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    names = plan_upload(folder, "merged", None, "").names()
    assert "additional_chat_templates/tool.jinja" in names
    assert not any(name.startswith("adapter") for name in names)


def test_of_a_checkpoint_only_the_student_goes(folder: Path) -> None:
    (folder / "resume").mkdir()
    for name in ("state.json", "complete", "rank-0.safetensors"):
        (folder / "resume" / name).write_text("{}")
    assert not any("resume" in name for name in plan_upload(folder, "merged", None, "").names())


def test_a_configuration_shows_no_folder_of_this_machine(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": "/home/me/x", "text_config": {"name_or_path": "a/b/c/d"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/me/base", "r": 16}))
    upload = plan_upload(folder, "merged", None, "")
    public = json.loads(content(upload, "config.json"))
    assert public == {**config, "_name_or_path": "x", "text_config": {"name_or_path": "d"}}
    assert json.loads(content(upload, "adapter_config.json")) == {"base_model_name_or_path": "base", "r": 16}


def test_a_cast_changes_the_configuration_and_the_index(folder: Path) -> None:
    save_file({"w": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"v": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    upload = plan_upload(folder, "merged", "bfloat16", "")
    assert json.loads(content(upload, "config.json"))["dtype"] == "bfloat16"
    assert "model.safetensors.index.json" not in upload.files and upload.sizes()["model.safetensors"] == 8
    as_it_is = plan_upload(folder, "merged", "float32", "")
    assert as_it_is.cast is None and set(index["weight_map"].values()) <= set(as_it_is.files)
    assert "model.safetensors" not in as_it_is.files  # the index says which files are the model


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"model-00001-of-00002\.safetensors is missing"):
        plan_upload(folder, "merged", None, "")


def test_weights_of_an_earlier_push_go_and_everything_else_stays(folder: Path) -> None:
    existing = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    existing += ["pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors"]
    kept = ["model.safetensors", "config.json", "LICENSE", "images/plot.png", ".gitattributes", "README.md"]
    assert sorted(replaced([*existing, *kept], plan_upload(folder, "merged", None, ""))) == sorted(existing)
