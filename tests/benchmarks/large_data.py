"""How long a source of many rows takes until its first batch, and how much memory.

    python -m tests.benchmarks.large_data FILE             read it, take a step's prompts, print seconds and peak memory as JSON
    python -m tests.benchmarks.large_data FILE --make 1000000    write it first: rows of 300 characters, tokens of the tiny tokenizer

`--characters 1200 --tokenizer FOLDER` for rows of 300 tokens of a real one.

Run it twice for the second start; HF_DATASETS_CACHE says where what is kept lies.
"""

import argparse
import json
import random
import resource
import time

STARTED = time.monotonic()

from transformers import AutoTokenizer  # noqa: E402  the imports are part of a start

from services.config import DataConfig  # noqa: E402
from trainer.data.training_rows import read_rows  # noqa: E402
from trainer.tiny.pair import build_tokenizer  # noqa: E402

PROMPTS_PER_STEP = 16


def make(path: str, count: int, characters: int) -> None:
    """Rows whose prompts have as many characters; no two are equal."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    with open(path, "w") as file:
        for number in range(count):
            text = f"{number} " + " ".join(rng.choices(words, k=characters // 5))
            file.write(json.dumps({"prompt": text[:characters].ljust(characters, "."), "answer": number}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--make", type=int)
    parser.add_argument("--characters", type=int, default=300)
    parser.add_argument("--tokenizer")
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.path, arguments.make, arguments.characters)
        return
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else build_tokenizer()
    rows, _ = read_rows(DataConfig(path=arguments.path), tokenizer, seed=0)
    prompts = rows.fitting(2 * arguments.characters)
    batch = prompts.stream(seed=0, shuffle=True).take(PROMPTS_PER_STEP)
    mean = sum(len(prompt.token_ids) for prompt in batch) / len(batch)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds = time.monotonic() - STARTED
    print(
        json.dumps(
            {
                "rows": len(prompts),
                "mean_tokens": mean,
                "first_batch_s": round(seconds, 1),
                "cpu_s": round(time.process_time(), 1),
                "peak_gib": round(peak_gib, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
