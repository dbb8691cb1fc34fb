"""A push to a hub on loopback: what arrives, what is refused, and that no refusal shows the token."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.errors import ConfigError, FolderInUseError, PeerError
from services.hub.push import push_to_hub
from services.hub.repository import set_timeouts
from services.process.folder_lock import lock_folder
from tests.hub import READ_TOKEN, TOKEN, Hub
from tests.unit.services.hub.finished_runs import finished_run


@pytest.fixture
def model(tiny_model_folder: Any) -> str:
    return str(tiny_model_folder("qwen3"))


@pytest.fixture
def run(model: str, tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run", model, checkpoints={10: model})


@torch.no_grad()
def logits(folder: Path | str, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return model(torch.arange(40).view(2, 20)).logits


def test_what_arrives_is_the_student_byte_for_byte_and_can_be_loaded(run: Path, hub: Hub, tmp_path: Path) -> None:
    url = push_to_hub(run, "me/student")
    assert url.startswith(f"{hub.url}/me/student/commit/")
    arrived = hub.files("me/student")
    student = {path.name: path.read_bytes() for path in (run / "student").iterdir()}
    card = arrived.pop("README.md").decode()
    assert arrived == student and card.startswith("---\nbase_model: Qwen/Qwen3-0.6B\n")
    folder = hub.write("me/student", tmp_path / "downloaded")
    assert torch.equal(logits(folder), logits(run / "student"))
    assert AutoTokenizer.from_pretrained(folder).get_vocab()
    assert hub.repos["me/student"].messages == [("main", "Upload the student of run")]
    assert not hub.repos["me/student"].private
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.json", "metrics.jsonl", "student"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_student_is_the_rounded_one(dtype: Any, run: Path, hub: Hub, tmp_path: Path) -> None:
    told: list[str] = []
    push_to_hub(run, "me/student", dtype=dtype, on_progress=told.append)
    folder = hub.write("me/student", tmp_path / "downloaded")
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    before = AutoModelForCausalLM.from_pretrained(run / "student")
    assert loaded.dtype == getattr(torch, dtype)
    for (name, weight), (_, other) in zip(loaded.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(weight, other.to(weight.dtype)), name
    assert told[0] == f"casting to {dtype}: file 1 of 1" and told[1].startswith(
        "uploading 7 files, 0.2 MB, to me/student"
    )
    assert not (run / ".push").exists()


def test_an_adapter_arrives_and_gives_the_adapted_logits(run: Path, model: str, hub: Hub, tmp_path: Path) -> None:
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**options))
    adapted.save_pretrained(run / "student" / "adapter")
    push_to_hub(run, "me/adapter", what="adapter")
    folder = hub.write("me/adapter", tmp_path / "downloaded")
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    files = {path.name for path in folder.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md", *tokenizer}
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == AutoTokenizer.from_pretrained(model).get_vocab()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == Path(model).name
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": model}))
    with torch.no_grad():
        expected = adapted.eval()(torch.arange(40).view(2, 20)).logits
    torch.testing.assert_close(logits(folder), expected)


def test_a_branch_is_created_and_main_stays_as_it_was(run: Path, hub: Hub) -> None:
    for _ in range(2):  # once created, once there
        push_to_hub(run, "me/student", revision="v1/beta", step=10, private=True, commit_message="Step 10: é")
    assert hub.files("me/student") == {} and "model.safetensors" in hub.files("me/student", "v1/beta")
    assert hub.repos["me/student"].private
    assert hub.repos["me/student"].messages[0] == ("v1/beta", "Step 10: é")


def test_what_an_earlier_push_left_is_not_loaded_beside_the_new_one(run: Path, hub: Hub) -> None:
    old = {
        "model-00001-of-00002.safetensors": b"x",
        "model.safetensors.index.json": b"{}",
        "adapter_config.json": b"{}",
    }
    hub.add("me/student", {**old, "LICENSE": b"mine", "model.safetensors": b"old"})
    push_to_hub(run, "me/student")
    arrived = hub.files("me/student")
    assert not set(old) & set(arrived) and arrived["LICENSE"] == b"mine"
    assert arrived["model.safetensors"] == (run / "student" / "model.safetensors").read_bytes()


def test_a_public_repository_is_not_pushed_to_as_a_private_one(run: Path, hub: Hub) -> None:
    hub.add("me/student", {})
    with pytest.raises(ConfigError, match="me/student is there already, and public"):
        push_to_hub(run, "me/student", private=True)
    assert hub.files("me/student") == {}
    hub.add("me/hidden", {}, private=True)
    push_to_hub(run, "me/hidden", private=True)


def test_a_running_run_is_refused_and_named(run: Path, hub: Hub) -> None:
    with lock_folder(run, "output.dir", "`distillserve up`"), pytest.raises(FolderInUseError, match="distillserve up"):
        push_to_hub(run, "me/student")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repo": "student"}, "must be owner/name"),
        ({"repo": "a/b/c"}, "--repo = 'a/b/c' is no name"),
        ({"repo": "me/a b"}, "is no name of a repository"),
        ({"repo": ""}, "is no name of a repository"),
        ({"repo": "me/模型"}, "is no name of a repository"),
        ({"revision": ""}, "is no name of a branch"),
        ({"revision": "a b"}, "is no name of a branch"),
        ({"revision": "é"}, "is no name of a branch"),
        ({"revision": "0" * 40}, "is a commit, to which nothing can be added"),
        ({"step": 0}, "--step = 0 must be at least 1"),
        ({"step": 3}, "checkpoints there are of steps: 10"),
    ],
)
def test_options_that_cannot_be_are_refused_before_the_hub_is_asked(
    options: dict[str, Any], expected: str, run: Path, hub: Hub
) -> None:
    with pytest.raises(ConfigError, match=expected):
        push_to_hub(run, **{"repo": "me/student", **options})
    assert hub.asked == []


def test_a_folder_that_is_no_run_is_not_made_one(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        push_to_hub(tmp_path / "absent", "me/student")
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("token", ["", "töken", "two words", "x" * 5000])
def test_a_token_that_is_none_is_refused_and_not_shown(
    token: str, run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_STORED_TOKENS_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="HF_TOKEN") as refused:
        push_to_hub(run, "me/student")
    assert not token or token not in str(refused.value)
    assert hub.asked == []


def refusal(run: Path, **options: Any) -> str:
    """The line with which a push is refused."""
    with pytest.raises(PeerError) as refused:
        push_to_hub(run, **{"repo": "me/student", **options})
    assert (
        refused.value.__cause__ is None and refused.value.__suppress_context__
    )  # no traceback shows what the hub said
    line = str(refused.value)
    assert "\n" not in line and len(line) < 400
    return line


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({"create": 500}, "creating the repository: .* answered 500: the hub has failed; push again"),
        ({"create": 404}, "answered 404: there is no me/student, or the token may not see it"),
        ({"create": "broken"}, "broke off the connection"),
        ({"create": "html"}, "gave no usable answer: JSONDecodeError"),
        ({"branch": 403}, "answered 403: the token may not write to me/student"),
        ({"tree": 429}, "reading the repository: .* answered 429: too many requests"),
        ({"yaml": 401}, "uploading: .* answered 401: the token is not accepted"),
        ({"preupload": 401}, "uploading: .* answered 401: the token is not accepted"),
        ({"preupload": "html"}, "gave no usable answer"),
        ({"batch": 403}, "answered 403"),
        ({"lfs": 403}, "answered 403"),
        ({"commit": 409}, "answered 409: me/student was changed by somebody else meanwhile"),
        ({"commit": 412}, "answered 412: me/student was changed by somebody else meanwhile"),
        ({"commit": 413}, "answered 413"),
        ({"commit": 500}, "answered 500"),
        ({"commit": "broken"}, "broke off the connection"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_changes_nothing(
    faults: dict[str, Any], expected: str, run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.faults.update(faults)
    line = refusal(run, revision="v1")
    assert re.search(expected, line), line
    hub.faults.clear()
    assert all(hub.files("me/student", branch) == {} for repo in hub.repos.values() for branch in repo.branches)
    push_to_hub(run, "me/student", revision="v1")  # the same again, when it works
    assert "model.safetensors" in hub.files("me/student", "v1")


def test_a_hub_that_fails_for_a_moment_is_asked_again(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: hub.faults.clear())
    hub.faults["lfs"] = 503
    for name in ("huggingface_hub", "huggingface_hub.utils._http"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    push_to_hub(run, "me/student")
    assert "503" in caplog.text and "secret-of-the-address" not in caplog.text


@pytest.mark.parametrize(
    ("token", "status"), [("hf_wrongToken0123456789abcdef", 401), ("plainsecret", 401), (READ_TOKEN, 403)]
)
def test_a_token_that_may_not_is_told_apart_and_never_shown(
    token: str,
    status: int,
    run: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    caplog.set_level(logging.DEBUG)
    line = refusal(run)
    assert f"answered {status}: the token" in line
    assert token not in line + caplog.text + "".join(capfd.readouterr())


def test_somebody_elses_namespace_is_refused(run: Path, hub: Hub) -> None:
    assert "answered 403" in refusal(run, repo="openai/student")


def test_a_pull_request_that_is_not_there_is_named(run: Path, hub: Hub) -> None:
    assert "me/student has no revision 'refs/pr/7'" in refusal(run, revision="refs/pr/7")


def test_metadata_that_the_hub_refuses_is_said(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.hub.push.model_card", lambda *_: "---\nbase_model: /a/b\n---\n")
    assert '"base_model" must be an id of a model' in refusal(run)


def test_a_hub_without_xet_storage_is_told_from_one_that_fails(
    run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    assert "HF_HUB_DISABLE_XET=1 does without it" in refusal(run)


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("http://127.0.0.1:1", "cannot be reached: .*check the network and HF_ENDPOINT"),
        ("http://no-such-host.invalid", "cannot be reached"),
        ("ftp://127.0.0.1", "is no address"),
        ("nonsense", "is no address"),
        ("http://user:swordfish@127.0.0.1:1", "cannot be reached"),
    ],
)
def test_a_hub_that_is_not_there(
    endpoint: str, expected: str, run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    line = refusal(run)
    assert re.search(expected, line), line
    assert "swordfish" not in line and TOKEN not in line


def test_offline_mode_is_named(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids it; unset it" in refusal(run)


def test_a_hub_that_says_nothing_is_given_up(run: Path, hub: Hub) -> None:
    set_timeouts(connect_s=5, silence_s=0.2)
    hub.faults["create"] = "silent"
    try:
        assert "does not answer (ReadTimeout)" in refusal(run)
    finally:
        hub.left.set()
        hub.left.clear()


def test_a_run_that_cannot_be_written_to_is_pushed_all_the_same(
    run: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in run.iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    push_to_hub(run, "me/student", dtype="bfloat16")
    assert "model.safetensors" in hub.files("me/student")
    assert sorted(path.name for path in run.iterdir()) == before
    assert not list(tmp_path.glob("distillserve-push-*"))


def test_what_a_killed_push_left_is_cleared(run: Path, hub: Hub) -> None:
    (run / ".push").mkdir()
    (run / ".push" / "model-00001-of-00009.safetensors").write_text("half")
    push_to_hub(run, "me/student", dtype="bfloat16")
    assert "model-00001-of-00009.safetensors" not in hub.files("me/student") and not (run / ".push").exists()


def test_a_push_of_the_same_again_is_no_error(run: Path, hub: Hub) -> None:
    push_to_hub(run, "me/student")
    first = dict(hub.objects)
    push_to_hub(run, "me/student")
    assert hub.objects == first


def test_the_folder_may_be_moved_and_pushed_from_there(run: Path, hub: Hub, tmp_path: Path) -> None:
    moved = shutil.move(run, tmp_path / "elsewhere é")
    push_to_hub(moved, "me/student")
    assert hub.repos["me/student"].messages[0][1] == "Upload the student of elsewhere é"
