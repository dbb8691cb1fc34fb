"""A repository of a model hub: created, checked and committed to; each refusal is one line without the token.

consumes   files and a message
produces   a branch with one commit more
waits for  the hub, as long as `set_timeouts` says, and in the attempts that huggingface_hub makes again
"""

import gc
import logging
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, set_client_factory
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from services.config.keys import key_problem
from services.errors import ConfigError, DistillServeError, PeerError
from services.hub.public_text import HIDDEN, public_text

MAIN = "main"

# Loggers that quote addresses and answers; what is signed in an address is a key.
_TALKATIVE = (
    *("huggingface_hub.utils._http", "huggingface_hub._commit_api", "huggingface_hub.hf_api"),
    *("httpx2", "httpcore2.http11", "httpcore2.connection", "httpcore2.proxy"),
)
_LONGEST_REASON = 300
_COMMIT_ID = re.compile(r"[0-9a-f]{40}")


def check_repository(repo: str, revision: str | None) -> None:
    """Raises ConfigError where a repository or a branch cannot be called so."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--repo = {repo!r} is no name of a repository: {error}; give owner/name") from None
    if repo.count("/") != 1:
        raise ConfigError(f"--repo = {repo!r} must be owner/name")
    if revision is not None and (not revision.strip() or any(not "!" <= character <= "~" for character in revision)):
        raise ConfigError(f"--revision = {revision!r} is no name of a branch; give one word")
    if revision is not None and _COMMIT_ID.fullmatch(revision):
        raise ConfigError(f"--revision = {revision!r} is a commit, to which nothing can be added; give a branch")


class Repository:
    """One branch of a model repository.

    Args:
        repo: "owner/name".
        revision: a branch, or a reference of a pull request (refs/pr/N).

    Raises:
        ConfigError: there is no token, or it cannot be one.
    """

    def __init__(self, repo: str, revision: str = MAIN) -> None:
        self.repo, self.revision = repo, revision
        token = get_token()
        if not token:
            raise ConfigError("there is no token for the model hub; set HF_TOKEN or run `hf auth login`")
        if (problem := key_problem(token)) is not None:
            raise ConfigError(
                f"the token for the model hub (HF_TOKEN, or that of `hf auth login`) {problem}; set it again"
            )
        self._token = token
        self._api = HfApi(token=token)

    def prepare(self, *, private: bool) -> None:
        """Make sure of the repository and the branch.

        Args:
            private: refuse one that is public.

        Raises:
            PeerError: the hub refuses, or cannot be reached.
            ConfigError: the repository is public and was to be private.
        """
        with self._refusals("creating the repository"):
            self._api.create_repo(self.repo, private=private or None, exist_ok=True)
            if private and not self._api.repo_info(self.repo).private:
                raise ConfigError(
                    f"--private: {self.repo} is there already, and public; make it private at the hub, or choose another --repo"
                )
            if self.revision != MAIN and not self.revision.startswith("refs/"):
                self._api.create_branch(self.repo, branch=self.revision, exist_ok=True)

    def names(self) -> list[str]:
        """Of the files in the branch.

        Raises:
            PeerError: the hub refuses, or cannot be reached.
        """
        with self._refusals("reading the repository"):
            return list(self._api.list_repo_files(self.repo, revision=self.revision))

    def commit(self, files: Mapping[str, Path | bytes], removed: list[str], message: str) -> str:
        """Add and remove files in one commit; returns its URL.

        Raises:
            PeerError: the hub refuses, or cannot be reached; nothing or all of it is in the branch.
        """
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, content) for name, content in files.items()
        ]
        operations += [CommitOperationDelete(name) for name in removed]
        with self._refusals("uploading"):
            done = self._api.create_commit(self.repo, operations, commit_message=message, revision=self.revision)
            return str(done.commit_url)

    @contextmanager
    def _refusals(self, doing: str) -> Iterator[None]:
        """What the hub or the network answers, as an error of ours; the token is in none of them."""
        with _quoting_nothing_secret(self._token):
            try:
                yield
            except DistillServeError:
                raise
            except KeyboardInterrupt as error:
                _end_bars(error)
                raise
            except Exception as error:
                _end_bars(error)
                # Without its cause: a traceback would show what the hub has quoted.
                raise PeerError(public_line(f"{doing}: {self._reason(error)}", self._token)) from None

    def _reason(self, error: BaseException) -> str:
        endpoint = self._api.endpoint
        refusal = _in_chain(error, HfHubHTTPError)
        if isinstance(refusal, HfHubHTTPError):
            return f"{endpoint} answered {refusal.response.status_code}: {self._advice(refusal)}"
        if _in_chain(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE forbids it; unset it"
        if (lost := _in_chain(error, httpx2.TimeoutException)) is not None:
            return f"{endpoint} does not answer ({type(lost).__name__}); push again, what has arrived is not sent again"
        if (lost := _in_chain(error, httpx2.ConnectError, httpx2.ProxyError)) is not None:
            return f"{endpoint} cannot be reached: {lost}; check the network and HF_ENDPOINT"
        if (lost := _in_chain(error, httpx2.NetworkError, httpx2.RemoteProtocolError)) is not None:
            return f"{endpoint} broke off the connection ({lost}); push again, what has arrived is not sent again"
        if _in_chain(error, httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError):
            return f"HF_ENDPOINT = {endpoint!r} is no address: {error}"
        if isinstance(error, ConnectionError) and "xet-" in str(error):  # of hf_xet
            return (
                f"{endpoint} has no Xet storage, or it cannot be reached: {error}; HF_HUB_DISABLE_XET=1 does without it"
            )
        return f"{endpoint} gave no usable answer: {type(error).__name__}: {error}"

    def _advice(self, error: HfHubHTTPError) -> str:
        said = f" ({error.server_message})" if error.server_message else ""
        status = error.response.status_code
        if isinstance(error, RevisionNotFoundError):
            return f"{self.repo} has no revision {self.revision!r}; give a branch, which is created{said}"
        if status == 401:
            return f"the token is not accepted, or may not see {self.repo}; set HF_TOKEN or run `hf auth login`{said}"
        if status == 403:
            return f"the token may not write to {self.repo}; give it write access, or choose another --repo{said}"
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            return f"there is no {self.repo}, or the token may not see it; check --repo and HF_ENDPOINT{said}"
        if status in (409, 412):
            return f"{self.repo} was changed by somebody else meanwhile; push again{said}"
        if status == 429:
            return f"too many requests; wait and push again{said}"
        if status >= 500:
            return f"the hub has failed; push again{said}"
        return error.server_message or str(error)


def public_line(text: str, token: str) -> str:
    """One line of at most a few hundred characters, in which nothing is secret."""
    line = public_text(" ".join(text.replace(token, HIDDEN).split()))
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 3] + "..."


def _in_chain(error: BaseException, *kinds: type[BaseException]) -> Any:
    """The error, or what it was raised from, of one of these kinds; None where there is none."""
    current: BaseException | None = error
    while current is not None and not isinstance(current, kinds):
        current = current.__cause__
    return current


def _end_bars(error: BaseException) -> None:
    """Let go of the progress bars in an error's frames: each writes once more when it goes, which is not to be at the end."""
    current: BaseException | None = error
    while current is not None:
        traceback.clear_frames(current.__traceback__)
        current = current.__cause__ or current.__context__
    gc.collect()


class _Public(logging.Filter):
    """Takes what is secret out of the records of a logger."""

    def __init__(self, token: str) -> None:
        super().__init__()
        self._token = token

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = public_line(record.getMessage(), self._token), ()
        return True


@contextmanager
def _quoting_nothing_secret(token: str) -> Iterator[None]:
    filter_ = _Public(token)
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    for logger in loggers:
        logger.addFilter(filter_)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(filter_)


def set_timeouts(connect_s: float, silence_s: float) -> None:
    """Let every request of huggingface_hub in this process end: by itself it waits for ever.

    Args:
        silence_s: how long a hub may neither take nor send a byte, seconds.
    """
    from huggingface_hub.utils._http import default_client_factory  # it has the hooks of each request

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.timeout = httpx2.Timeout(silence_s, connect=connect_s)
        return made

    set_client_factory(client)
