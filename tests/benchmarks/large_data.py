"""How long a source of many rows takes until its first batch, and how much memory.

    python -m tests.benchmarks.large_data FILE             read it, take a step's prompts, print seconds and peak memory as JSON
    python -m tests.benchmarks.large_data FILE --make 1000000    write it first: rows of 300 tokens of the tiny tokenizer

Run it twice for the second start; HF_DATASETS_CACHE says where what is kept lies.
"""

import argparse
import json
import random
import resource
import time

STARTED = time.monotonic()

from services.config import DataConfig  # noqa: E402  the imports are part of a start
from trainer.data.training_rows import read_rows  # noqa: E402
from trainer.tiny.pair import build_tokenizer  # noqa: E402

ROW_TOKENS, PROMPTS_PER_STEP = 300, 16


def make(path: str, count: int) -> None:
    """Rows whose prompts have ROW_TOKENS characters, each a token; no two are equal."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    with open(path, "w") as file:
        for number in range(count):
            text = f"{number} " + " ".join(rng.choices(words, k=60))
            file.write(json.dumps({"prompt": text[:ROW_TOKENS].ljust(ROW_TOKENS, "."), "answer": number}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--make", type=int)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.path, arguments.make)
        return
    rows, _ = read_rows(DataConfig(path=arguments.path), build_tokenizer(), seed=0)
    prompts = rows.fitting(400)
    batch = prompts.stream(seed=0, shuffle=True).take(PROMPTS_PER_STEP)
    assert all(len(prompt.token_ids) == ROW_TOKENS for prompt in batch)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = time.monotonic() - STARTED
    print(json.dumps({"rows": len(prompts), "first_batch_s": round(seconds, 1), "peak_gib": round(peak_gib, 2)}))


if __name__ == "__main__":
    main()
