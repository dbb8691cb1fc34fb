"""Which versions this run has pushed, and whether what a server sampled is of one of them."""

from collections import Counter
from collections.abc import Iterable

from services.errors import PeerError, WeightsWantedError
from services.wire.policy_label import PolicyLabel
from services.wire.rollout import RolloutCompletion


class PolicyVersions:
    """The labels of one run's pushes. Only those whose canary has passed are live: what was sampled under any other label is
    of another run, of a push that failed, or of a server that was started again.

    Args:
        run: id of the run.
    """

    def __init__(self, run: str) -> None:
        self.run = run
        self._attempts: Counter[int] = Counter()
        self._live: dict[str, int] = {}
        self.current: str | None = None
        """The label of the newest push; None before the first."""

    def next_label(self, version: int) -> PolicyLabel:
        """The label of one more attempt to push a version."""
        self._attempts[version] += 1
        return PolicyLabel(version, self._attempts[version], self.run)

    def set_live(self, label: PolicyLabel) -> None:
        """The servers sample under it."""
        self._live[str(label)] = label.version
        self.current = str(label)

    def of(self, completion: RolloutCompletion) -> list[int]:
        """The versions under which the tokens of a completion were sampled, in order.

        Raises:
            WeightsWantedError: one was sampled under a label that this run has not pushed.
            PeerError: nothing says under which one was sampled.
        """
        versions = []
        end = 0
        for span in completion.policy_versions:
            if span.policy_version not in self._live:
                raise WeightsWantedError(
                    f"a rollout server sampled under the version {span.policy_version!r}, which is none that the run {self.run} "
                    "has pushed; it was started again, or another trainer uses it"
                )
            versions.append(self._live[span.policy_version])
            if span.start != end:
                break
            end = span.end
        if end != len(completion.token_ids):
            raise PeerError("a rollout server does not say under which version it sampled every token of a completion")
        return versions

    def oldest(self, completions: Iterable[RolloutCompletion]) -> int:
        """The version of the oldest token: a batch is as stale as that one.

        Raises:
            PeerError: as of `of`.
        """
        return min(version for completion in completions for version in self.of(completion))

    def check(self, completions: Iterable[RolloutCompletion], version: int) -> None:
        """Every token must have been sampled under `version`.

        Raises:
            WeightsWantedError: one was not.
        """
        for completion in completions:
            if (seen := set(self.of(completion))) != {version}:
                raise WeightsWantedError(
                    f"a rollout server answers under version {sorted(seen)} after a push of version {version}"
                )
