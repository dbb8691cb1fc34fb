"""Lists of GPUs: what can be read, what is refused, which of them are one card."""

import pytest

from services.config.cuda_devices import overlap, parse_devices


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", ("0",)),
        ("2, 01", ("2", "1")),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("GPU-8932F937", ("GPU-8932f937",)),
    ],
)
def test_a_list_is_read_as_cuda_reads_it(value: str, expected: tuple[str, ...]) -> None:
    assert parse_devices("x", value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("gpu0", "'gpu0' is no GPU"),
        ("0,,1", "'' is no GPU"),
        ("cuda:0", "'cuda:0' is no GPU"),
        ("٣", "is no GPU"),
        ("0,GPU-8932f937", "mixes numbers and UUIDs"),
        ("1,1", "names a GPU twice"),
        ("1,01", "names a GPU twice"),
        ("GPU-8932f937,GPU-8932", "names a GPU twice"),
    ],
)
def test_another_list_is_refused_with_its_option(value: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^teacher.cuda_devices = .*{reason}"):
        parse_devices("teacher.cuda_devices", value)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ("0,1", "1", True),
        ("0", "1", False),
        ("GPU-8932f937", "GPU-8932f937-d72c", True),
        ("GPU-8932f937", "GPU-0a1b", False),
        ("0", "GPU-8932f937", None),
        ("MIG-1", "MIG-2", None),
        ("MIG-1", "MIG-1", True),
        ("MIG-1", "GPU-8932f937", None),
        ("", "0", False),
    ],
)
def test_cards_are_compared_only_where_the_lists_tell(ours: str, theirs: str, expected: bool | None) -> None:
    lists = parse_devices("x", ours), parse_devices("x", theirs)
    assert overlap(*lists) is expected and overlap(*reversed(lists)) is expected
