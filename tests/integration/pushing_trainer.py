"""A trainer that pushes without pause and says the number of each push that is done: python -m ... URL MODEL."""

import asyncio
import itertools
import sys

from services.config import RunConfig
from tests.integration.attach import attached
from trainer.model import load_student


async def main(url: str, model: str) -> None:
    student = load_student(RunConfig(student={"model": model}).student)
    async with attached(student, url) as (sync, _):
        for version in itertools.count():
            await sync.push(version)
            print(version, flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
