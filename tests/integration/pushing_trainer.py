"""A trainer that pushes without pause and says the number of each push that is done: python -m ... URL MODEL."""

import asyncio
import itertools
import sys

from tests.integration.attach import attached
from tests.pushing import learner_of


async def main(url: str, model: str) -> None:
    async with attached(learner_of(model), url) as (pushing, _):
        for version in itertools.count():
            await pushing.push(version)
            print(version, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
