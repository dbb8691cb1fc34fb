"""Run files: what is refused in them, and where."""

from pathlib import Path

import pytest

from services.config import RunConfig
from tests.unit.services.config.commands import assert_reads, refused, resolved

RUNS = Path(__file__).parents[4] / "deploy" / "runs"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("run.toml", b"[loss]\ngama = 0.5", "loss.gama is not an option; did you mean loss.gamma?"),
        ("run.toml", b"[los]\ngamma = 0.5", "los is not an option; did you mean loss?"),
        ("run.toml", b"[loss]\ngamma = 3", "loss.gamma ... 3"),
        ("run.toml", b"[loss]\ngamma = 'x'\n[teacher]\nport = 0", "teacher.port ... loss.gamma"),
        ("run.toml", b"loss = 3", "loss ... dictionary ... 3"),
        ("run.toml", b"[student]\nmodel = 7", "student.model ... string ... 7"),
        ("run.toml", b"[loss]\ngamma = nan", "loss.gamma ... nan"),
        ("run.toml", b"[loss\n", "run.toml ... line 1"),
        ("run.json", b'{"loss": {"gama": 1}}', "did you mean loss.gamma?"),
        ("run.json", b'{"sampling": {"top_p": 0}}', "sampling.top_p"),
        ("run.json", b"{", "run.json"),
        ("run.json", b"[1]", "run.json"),
        ("run.json", b"null", "run.json"),
        ("run.json", b"\xff\xfe", "run.json"),
        ("run.json", b'{"seed": 1, "seed": 2}', "run.json: seed is given twice"),
        ("run.json", b'{"loss": {"gamma": 0.5, "gamma": 0.9}}', "run.json: gamma is given twice"),
        ("run.json", b'{"loss": {"gamma": NaN}}', "run.json: NaN is no JSON number"),
    ],
)
def test_a_bad_run_file_is_refused_in_one_line(
    name: str, content: bytes, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert_reads(refused(capsys, "train", str(tmp_path / name)), expected)


@pytest.mark.parametrize(
    ("name", "content"), [("run.toml", "[loss]\r\ngamma = 0.25\r\n"), ("run.json", '{"loss": {"gamma": 0.25}}')]
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_a_run_file_may_begin_with_a_bom(
    bom: bytes, name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(bom + content.encode())
    assert resolved(capsys, "train", str(tmp_path / name))["loss"]["gamma"] == 0.25


def test_a_missing_run_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'no-such.toml' does not exist" in refused(capsys, "train", "no-such.toml")


def test_a_resolved_config_can_be_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(loss={"advantage_clip": None, "gamma": 0.5}, rollout_client={"urls": ["http://a:1"]})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    assert RunConfig.model_validate(resolved(capsys, "train", str(tmp_path / "config.json"))) == config


@pytest.mark.parametrize("run_file", sorted(RUNS.glob("*.toml")), ids=lambda path: path.name)
def test_shipped_run_files_parse(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolved(capsys, "up", str(run_file))
