"""The image: a change of the sources installs nothing anew, and all that is copied is sent to the builder."""

from fnmatch import fnmatch

from tests.unit.deploy.stack import CLONE

LINES = (CLONE / "docker" / "Dockerfile").read_text().splitlines()
IGNORED = (CLONE / ".dockerignore").read_text().split()


def position(beginning: str) -> int:
    return next(index for index, line in enumerate(LINES) if line.startswith(beginning))


def copied() -> list[str]:
    return [word for line in LINES if line.startswith("COPY ") for word in line.split()[1:-1]]


def test_dependencies_are_installed_before_the_sources_are_copied() -> None:
    installed = next(index for index, line in enumerate(LINES) if "bash deploy/setup.sh" in line)
    assert position("COPY pyproject.toml") < installed < position("COPY services") < position("COPY trainer")
    assert not any("README" in line for line in LINES if line.startswith("COPY"))


def test_what_is_copied_is_sent_and_nothing_else() -> None:
    assert IGNORED[0] == "*"
    assert {pattern.removeprefix("!") for pattern in IGNORED if pattern.startswith("!")} == set(copied())
    assert all((CLONE / source).exists() for source in copied())


def test_no_line_needs_buildkit() -> None:
    assert not any(fnmatch(line, "*RUN --*") or fnmatch(line, "COPY --chmod*") or "# syntax" in line for line in LINES)


def test_any_user_can_read_what_was_cloned_under_a_strict_umask() -> None:
    assert position("RUN chmod -R a+rX /app") > position("COPY trainer")


def test_caches_are_where_the_stack_keeps_its_volume() -> None:
    text = "\n".join(LINES)
    for variable in ("HF_HOME", "VLLM_CACHE_ROOT", "TRITON_CACHE_DIR"):
        assert f"{variable}=/cache/" in text
