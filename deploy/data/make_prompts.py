"""Write train.jsonl and held-out.jsonl beside this file: the prompts of deploy/runs/qwen3.toml, the same at every call.

Three rows in four are word problems whose answer is one whole number, for exact match; the others ask for a few
sentences and have no answer. No prompt is in both files.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

NUM_TRAIN, NUM_HELD_OUT = 480, 120
OPEN_SHARE = 4  # every fourth row

NAMES = [
    "Ada",
    "Bruno",
    "Chen",
    "Dalia",
    "Emeka",
    "Farah",
    "Goran",
    "Hana",
    "Ines",
    "Jonas",
    "Kofi",
    "Leila",
    "Mateo",
    "Nadia",
    "Oskar",
    "Priya",
    "Ravi",
    "Sofia",
]
THINGS = [
    "apples",
    "pencils",
    "stamps",
    "marbles",
    "tickets",
    "candles",
    "shells",
    "buttons",
    "postcards",
    "tiles",
    "bolts",
    "jars",
]
JOBS = ["baker", "gardener", "librarian", "plumber", "nurse", "carpenter", "potter", "pilot"]
TOPICS = [
    "tides", "compound interest", "a rainbow", "yeast in bread", "the water cycle", "a lever", "inflation", "echoes",
    "photosynthesis", "a thermostat", "magnets", "vaccines", "leap years", "soap", "a compass", "fermentation",
]  # fmt: skip
READERS = ["a child of eight", "a curious neighbour", "a new colleague", "somebody in a hurry"]

Problem = tuple[str, int]


def shopping(pick: random.Random) -> Problem:
    name, thing = pick.choice(NAMES), pick.choice(THINGS)
    count, price, given = pick.randint(3, 19), pick.randint(2, 14), pick.choice([300, 400, 500])
    text = f"{name} buys {count} {thing} at {price} coins each and pays with {given} coins. How many coins come back?"
    return text, given - count * price


def sharing(pick: random.Random) -> Problem:
    name, thing = pick.choice(NAMES), pick.choice(THINGS)
    friends, each, rest = pick.randint(3, 9), pick.randint(4, 25), pick.randint(0, 2)
    total = friends * each + rest
    text = f"{name} has {total} {thing} and gives {friends} friends as many as possible, the same number each. How many {thing} are left?"
    return text, rest


def journey(pick: random.Random) -> Problem:
    first, second, hours, more = pick.randint(40, 95), pick.randint(40, 95), pick.randint(2, 6), pick.randint(2, 5)
    text = f"A train runs {hours} hours at {first} km/h and then {more} hours at {second} km/h. How many kilometres is that?"
    return text, hours * first + more * second


def savings(pick: random.Random) -> Problem:
    name, start, weekly, weeks, spent = (
        pick.choice(NAMES), pick.randint(20, 90), pick.randint(5, 30), pick.randint(4, 16), pick.randint(10, 60),
    )  # fmt: skip
    past = f"{name} has {start} euros, saves {weekly} euros a week for {weeks} weeks and then spends {spent} euros."
    return f"{past} How many euros are there now?", start + weekly * weeks - spent


def rows_of_seats(pick: random.Random) -> Problem:
    rows, seats, empty = pick.randint(8, 30), pick.randint(9, 28), pick.randint(5, 60)
    return (
        f"A hall has {rows} rows of {seats} seats, and {empty} seats are empty. How many seats are taken?",
        rows * seats - empty,
    )


def ages(pick: random.Random) -> Problem:
    older, younger = pick.sample(NAMES, 2)
    age, gap, years = pick.randint(6, 40), pick.randint(2, 15), pick.randint(3, 20)
    text = f"{younger} is {age} and {older} is {gap} years older. How old will they be together in {years} years?"
    return text, 2 * age + gap + 2 * years


def working_hours(pick: random.Random) -> Problem:
    job, days, hours, pause = pick.choice(JOBS), pick.randint(3, 6), pick.randint(6, 10), pick.choice([15, 20, 30, 45])
    text = f"A {job} works {days} days of {hours} hours, of which {pause} minutes a day are a break. How many minutes of work is that?"
    return text, days * (hours * 60 - pause)


def fence(pick: random.Random) -> Problem:
    length, width, gate = pick.randint(8, 60), pick.randint(5, 40), pick.randint(2, 4)
    text = f"A garden of {length} m by {width} m gets a fence all around, but for a gate of {gate} m. How many metres of fence are needed?"
    return text, 2 * (length + width) - gate


def percent(pick: random.Random) -> Problem:
    price, off = 20 * pick.randint(2, 30), pick.choice([5, 10, 15, 20, 25, 30, 40])
    text = f"A coat costs {price} euros and is now {off} percent cheaper. How many euros does it cost now?"
    return text, price - price * off // 100


def expression(pick: random.Random) -> Problem:
    a, b, c, d = pick.randint(11, 60), pick.randint(3, 12), pick.randint(11, 99), pick.randint(2, 9)
    return f"What is {a} * {b} - {c} + {d} * {d}?", a * b - c + d * d


def sequence(pick: random.Random) -> Problem:
    start, step, shown = pick.randint(1, 40), pick.randint(3, 17), 4
    terms = ", ".join(str(start + step * index) for index in range(shown))
    place = pick.randint(8, 20)
    return f"A sequence begins {terms} and goes on in the same way. What is its term number {place}?", start + step * (
        place - 1
    )


PROBLEMS: list[Callable[[random.Random], Problem]] = [
    shopping, sharing, journey, savings, rows_of_seats, ages, working_hours, fence, percent, expression, sequence,
]  # fmt: skip


def open_prompts() -> list[str]:
    """All of them, in a fixed order."""
    explain = [f"Explain {topic} to {reader} in three sentences." for topic in TOPICS for reader in READERS]
    mistake = [f"Name a common mistake about {topic} and put it right in two sentences." for topic in TOPICS]
    advice = [f"Give a {job} three short pieces of advice about {topic}." for job in JOBS for topic in TOPICS[::2]]
    letter = [
        f"Write two polite sentences in which {name} asks a {job} to come a day later."
        for name, job in zip(NAMES, itertools.cycle(JOBS), strict=False)
    ]
    return explain + mistake + advice + letter


def problems(pick: random.Random) -> Iterator[Problem]:
    """Without end, no text twice."""
    seen: set[str] = set()
    for make in itertools.cycle(PROBLEMS):
        text, answer = make(pick)
        if text not in seen:
            seen.add(text)
            yield text, answer


def rows() -> list[dict]:
    pick = random.Random(0)
    unanswered = open_prompts()
    pick.shuffle(unanswered)
    answered = problems(pick)
    found = []
    for index in range(NUM_TRAIN + NUM_HELD_OUT):
        if index % OPEN_SHARE == OPEN_SHARE - 1:
            found.append({"messages": [{"role": "user", "content": unanswered.pop()}]})
            continue
        text, answer = next(answered)
        content = f"{text} Answer with the number alone."
        found.append({"messages": [{"role": "user", "content": content}], "answer": str(answer)})
    return found


def main(folder: Path) -> None:
    everything = rows()
    for name, part in (("train", everything[:NUM_TRAIN]), ("held-out", everything[NUM_TRAIN:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


if __name__ == "__main__":
    main(Path(__file__).parent)
