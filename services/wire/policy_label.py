"""What a push is called: the weights of one version of one run."""

import re
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field

RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
_LABEL = re.compile(r"(0|[1-9][0-9]{0,17})\.([1-9][0-9]{0,8})@([A-Za-z0-9_-]{1,64})")


@dataclass(frozen=True)
class PolicyLabel:
    """What a server calls the weights of one push: "5.1@3f9c2a1b" is version 5 of the run 3f9c2a1b, at its first attempt.

    Tokens that were sampled under a push that failed later, or under the version 5 of another run, are so told apart.
    """

    version: int
    attempt: int
    run: str

    def __str__(self) -> str:
        return f"{self.version}.{self.attempt}@{self.run}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Inverse of `str`.

        Raises:
            ValueError: the text is no label; "default" is none either.
        """
        found = _LABEL.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no version of a run, which looks like 5.1@3f9c2a1b")
        return cls(int(found[1]), int(found[2]), found[3])
