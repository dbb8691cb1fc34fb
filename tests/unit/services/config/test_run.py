"""A run as a whole: what its roles need, where its servers are, how weights travel, which folder it may write."""

from pathlib import Path

import pytest

from services.config import RunConfig, TeacherConfig, check_output_dir
from services.errors import ConfigError
from tests.unit.services.config.commands import COMPLETE, refused


@pytest.mark.parametrize(
    ("role", "left_out"),
    [("rollout", "student.model"), ("teacher", "teacher.model"), ("train", "data.path"), ("up", "pipeline.steps")],
)
def test_what_a_role_needs_is_asked_for_by_name(role: str, left_out: str, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = zip(COMPLETE[::2], COMPLETE[1::2], strict=True)
    given = [] if role in ("rollout", "teacher") else [pair for pair in pairs if pair[0] != f"--{left_out}"]
    line = refused(capsys, role, *(text for pair in given for text in pair))
    assert f"{left_out} is required by `distillserve {role}`" in line and f"--{left_out}" in line


@pytest.mark.parametrize("urls", [[], ["http://a:1/", "http://b:2"]])
def test_servers_are_found_at_their_urls_or_at_host_and_port(urls: list[str]) -> None:
    config = RunConfig(
        rollout={"host": "0.0.0.0", "port": 9},
        rollout_client={"urls": urls},
        teacher={"host": "0.0.0.0", "port": 8},
        teacher_client={"urls": [f"{url.rstrip('/')}0" for url in urls]},
    )
    assert config.rollout_urls() == (["http://a:1", "http://b:2"] if urls else ["http://127.0.0.1:9"])
    assert config.teacher_urls() == (["http://a:10", "http://b:20"] if urls else ["http://127.0.0.1:8"])
    for host, url in (("::1", "[::1]"), ("[0:0::1]", "[::1]"), ("::", "[::1]"), ("LocalHost", "localhost")):
        assert TeacherConfig(host=host, port=9).url() == f"http://{url}:9"


@pytest.mark.parametrize(
    ("student", "rollout", "expected"),
    [
        ("1", "0", "nccl"),
        ("0,1", "1,2", "gloo"),
        (None, "0", "gloo"),
        ("", "0", "gloo"),
        ("GPU-8932f937", "0", "gloo"),  # nobody can tell without that machine's driver
        ("MIG-1", "MIG-2", "gloo"),
    ],
)
def test_auto_takes_nccl_only_between_different_gpus(student: str | None, rollout: str, expected: str) -> None:
    config = RunConfig(student={"cuda_devices": student}, rollout={"cuda_devices": rollout})
    assert config.weight_sync_backend() == expected


@pytest.mark.parametrize("left", ["summary.json", "student", "checkpoints/step-2", ".student.before"])
def test_what_a_run_has_learned_is_not_overwritten(left: str, tmp_path: Path) -> None:
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=rf"holds an earlier run \({left.removesuffix('/step-2')}\).*output\.overwrite"
    ):
        check_output_dir(RunConfig(output={"dir": str(tmp_path)}))
    assert check_output_dir(RunConfig(output={"dir": str(tmp_path), "overwrite": True})) == tmp_path


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_run_does_not_replace_the_model_it_starts_from(role: str, tmp_path: Path) -> None:
    output = {"dir": str(tmp_path), "overwrite": True}
    for model in (tmp_path, tmp_path / "student", tmp_path / "checkpoints" / "step-3"):
        with pytest.raises(ConfigError, match=rf"{role}\.model = .* lies in output\.dir"):
            check_output_dir(RunConfig(output=output, **{role: {"model": str(model)}}))
    check_output_dir(RunConfig(output=output, **{role: {"model": str(tmp_path / "students")}}))


def test_up_refuses_a_finished_run_before_it_starts_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "summary.json").touch()
    options = {"--student.model": tmp_path, "--teacher.model": tmp_path, "--data.path": "d", "--pipeline.steps": 1}
    argv = [str(text) for pair in options.items() for text in pair]
    line = refused(capsys, "up", *argv, "--output.dir", str(tmp_path))
    assert f"output.dir = '{tmp_path}'" in line and "--output.overwrite true" in line
    files = [path.name for path in tmp_path.iterdir() if path.name != ".lock"]
    assert sorted(files) == ["config.json", "summary.json"]
