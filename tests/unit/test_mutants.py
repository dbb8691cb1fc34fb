"""Which changes `make mutants` makes to a module."""

from tests.mutants import mutants

SOURCE = """
LIMIT: int | None = 3

@dataclass(frozen=True)
class Rows:
    def fits(self, size: int = 2) -> bool | None:
        if self.is_open():
            self.close()
        return size < LIMIT and size + 1 not in self.sizes
"""


def test_one_place_that_runs_is_changed_at_a_time() -> None:
    found = list(mutants(SOURCE))
    last = "size < LIMIT and size + 1 not in self.sizes"
    assert sorted((what["line"], what["before"], what["after"]) for what, _ in found) == [
        (2, "3", "4"),
        (6, "2", "3"),
        (7, "if self.is_open():\n    self.close()", "if not self.is_open():\n    self.close()"),
        (8, "self.close()", "None"),
        (9, "1", "2"),
        (9, f"return {last}", "return None"),
        (9, "size + 1", "size - 1"),
        (9, "size + 1 not in self.sizes", "size + 1 in self.sizes"),
        (9, "size < LIMIT", "size <= LIMIT"),
        (9, last, "size < LIMIT or size + 1 not in self.sizes"),
    ]
    for what, changed in found:
        assert changed.count(str(what["after"]).splitlines()[0]) >= 1 and "frozen=True" in changed
    assert len({changed for _, changed in found}) == len(found)
