"""A token counts only if it was sampled under a push of this run whose canary has passed."""

import numpy as np
import pytest

from services.errors import PeerError
from services.wire.policy_label import PolicyLabel
from services.wire.rollout import RolloutCompletion, VersionSpan
from trainer.weights.policy_versions import PolicyVersions


def completion(*spans: tuple[str, int, int], length: int = 3) -> RolloutCompletion:
    ids, logprobs = np.zeros(length, np.int32), np.zeros(length, np.float32)
    return RolloutCompletion(0, 0, ids, logprobs, "stop", [VersionSpan(*span) for span in spans])


@pytest.fixture
def versions() -> PolicyVersions:
    """Version 4 has failed once; 4 and 5 are live."""
    versions = PolicyVersions("mine")
    versions.next_label(4)
    for version in (4, 5):
        versions.set_live(versions.next_label(version))
    return versions


def test_labels_count_attempts_and_name_the_run(versions: PolicyVersions) -> None:
    assert [str(versions.next_label(version)) for version in (4, 5, 6)] == ["4.3@mine", "5.2@mine", "6.1@mine"]


def test_the_label_of_the_newest_push_is_the_current_one(versions: PolicyVersions) -> None:
    assert versions.current == "5.1@mine" and PolicyVersions("mine").current is None
    versions.next_label(6)
    assert versions.current == "5.1@mine"  # its canary has not passed
    versions.set_live(versions.next_label(5))
    assert versions.current == "5.2@mine"


def test_a_batch_is_as_old_as_its_oldest_token(versions: PolicyVersions) -> None:
    young, mixed = completion(("5.1@mine", 0, 3)), completion(("4.2@mine", 0, 1), ("5.1@mine", 1, 3))
    assert versions.oldest([young]) == 5 and versions.oldest([young, mixed]) == 4
    versions.check([young], 5)
    with pytest.raises(PeerError, match=r"answers under version \[4, 5\] after a push of version 5"):
        versions.check([young, mixed], 5)


@pytest.mark.parametrize(
    "label",
    ["default", "mixed", "5", "5.1", "5.1@yours", "4.1@mine", "5.2@mine", "05.1@mine", "5.1@mine ", "", "٥.1@mine"],
)
def test_what_was_sampled_under_any_other_label_is_refused(label: str, versions: PolicyVersions) -> None:
    for spans in ([(label, 0, 3)], [("5.1@mine", 0, 2), (label, 2, 3)]):
        with pytest.raises(PeerError, match="which is none that the run mine has pushed"):
            versions.oldest([completion(*spans)])


@pytest.mark.parametrize("spans", [[], [(0, 2)], [(1, 3)], [(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 4)], [(-1, 3)]])
def test_every_token_has_exactly_one_version(spans: list[tuple[int, int]], versions: PolicyVersions) -> None:
    with pytest.raises(PeerError, match="does not say under which version it sampled every token"):
        versions.check([completion(*(("5.1@mine", *span) for span in spans))], 5)


def test_a_label_is_read_as_it_is_written_and_in_no_other_way() -> None:
    label = PolicyLabel(12, 3, "a-b_C9")
    assert PolicyLabel.parse(str(label)) == label
    for text in (
        "default",
        "1",
        "1.1",
        "1.0@a",
        "01.1@a",
        "1.1@",
        "1.1@a b",
        "1.1@a\n",
        "-1.1@a",
        "1.1@" + "a" * 65,
        "9" * 30 + ".1@a",
    ):
        with pytest.raises(ValueError, match="is no version of a run"):
            PolicyLabel.parse(text)
