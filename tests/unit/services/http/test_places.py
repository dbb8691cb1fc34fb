"""How many requests are accepted at once."""

import pytest

from services.errors import RequestError
from services.http.places import Places


def test_one_too_many_is_told_when_to_come_back_and_a_place_is_free_again_at_the_end() -> None:
    seen: list[int] = []
    places = Places(2, on_change=seen.append)
    with pytest.raises(ZeroDivisionError), places.take(lambda: 7.0), places.take(lambda: 7.0):
        with pytest.raises(RequestError, match="2 requests wait already") as caught, places.take(lambda: 7.0):
            pass
        assert (caught.value.status, caught.value.retry_after_s, places.taken) == (429, 7.0, 2)
        raise ZeroDivisionError
    assert places.taken == 0 and seen == [1, 2, 1, 0]
