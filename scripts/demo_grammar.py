"""The text of the demo checkpoints: an invented world of people, and small tasks with one right answer each.

Everything follows from a seed, nothing is quoted. Instances of the compositional tasks are split for good by a checksum
of their content: one in eight belongs to the held-out text and the questions, and no training text ever contains it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

WORLD_SEED = 11
PEOPLE = 120
HELD_OUT_SHARE = 8  # one instance in this many

CRAFTS = [
    "baker",
    "weaver",
    "potter",
    "miller",
    "smith",
    "sailor",
    "painter",
    "tailor",
    "mason",
    "glazier",
    "cooper",
    "hunter",
    "farmer",
    "scribe",
    "tanner",
    "carver",
]
COLOURS = ["red", "blue", "green", "yellow", "black", "white", "purple", "teal", "brown", "grey", "pink", "silver"]
ANIMALS = ["cat", "dog", "goat", "horse", "crow", "wren", "fox", "hare", "toad", "lynx", "pig", "swan"]
ONSETS = [
    "b",
    "br",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pr",
    "r",
    "s",
    "sk",
    "t",
    "tr",
    "v",
    "z",
]
OPEN = "([{<"
CLOSE = ")]}>"


@dataclass(frozen=True)
class Person:
    """One inhabitant and what is true of them."""

    name: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Task:
    """One question with a right answer and three wrong ones, as a drill line and as a spoken question."""

    kind: str
    prompt: str
    answer: str
    wrong: tuple[str, str, str]
    question: str
    reply: str
    reason: str


# The first three of each end with the value, so that a question can stop before it.
STATEMENTS: dict[str, tuple[str, ...]] = {
    "town": (
        "{n} lives in {v}.",
        "The home town of {n} is {v}.",
        "You will find {n} in {v}.",
        "{v} is where {n} lives.",
        "Go to {v} to meet {n}.",
    ),
    "craft": (
        "{n} works as a {v}.",
        "The craft of {n} is that of a {v}.",
        "By trade {n} is a {v}.",
        "Being a {v} is the work of {n}.",
        "A good {v} is {n}.",
    ),
    "colour": (
        "{n} loves the colour {v}.",
        "The favourite colour of {n} is {v}.",
        "The door of {n} is painted {v}.",
        "{v} is the colour that {n} loves.",
        "A {v} coat belongs to {n}.",
    ),
    "animal": (
        "{n} keeps a {v}.",
        "The animal of {n} is a {v}.",
        "At night {n} feeds the {v}.",
        "A {v} follows {n} everywhere.",
        "The {v} at the gate belongs to {n}.",
    ),
    "age": (
        "The age of {n} is {v}.",
        "The years of {n} number {v}.",
        "When asked for an age, {n} says {v}.",
        "{n} is {v} years old.",
        "It is {v} years since {n} was born.",
    ),
    "friend": (
        "The best friend of {n} is {v}.",
        "{n} often visits {v}.",
        "Nobody is closer to {n} than {v}.",
        "{v} is the best friend of {n}.",
        "Ask {v} about {n}.",
    ),
}
QUESTIONS: dict[str, tuple[str, ...]] = {
    "town": ("Where does {n} live?", "What is the home town of {n}?"),
    "craft": ("What is the craft of {n}?", "What work does {n} do?"),
    "colour": ("Which colour does {n} love?", "What is the favourite colour of {n}?"),
    "animal": ("Which animal does {n} keep?", "What is the animal of {n}?"),
    "age": ("How old is {n}?", "What is the age of {n}?"),
    "friend": ("Who is the best friend of {n}?", "Whom does {n} often visit?"),
}
TOPICS = {
    "town": "home town",
    "craft": "craft",
    "colour": "favourite colour",
    "animal": "animal",
    "age": "age",
    "friend": "best friend",
}
ATTRIBUTES = tuple(STATEMENTS)


def _invented(rng: random.Random, ending: tuple[str, ...], taken: set[str]) -> str:
    while True:
        onset = rng.choice(ONSETS)
        middle = rng.choice("bdgklmnprtvz")
        word = (onset + rng.choice("aeiou") + middle + rng.choice(ending)).capitalize()
        if len(word) > 4 and word[:4] not in taken:
            taken.add(word[:4])
            return word


def world() -> list[Person]:
    """The people, always the same."""
    rng = random.Random(WORLD_SEED)
    taken: set[str] = set()
    towns = [_invented(rng, ("amor", "idun", "ovik", "uhal", "esto"), taken) for _ in range(20)]
    names = [_invented(rng, ("ax", "en", "il", "ok", "ush", "em", "o", "a"), taken) for _ in range(PEOPLE)]
    people = []
    for index, name in enumerate(names):
        facts = {
            "town": rng.choice(towns),
            "craft": rng.choice(CRAFTS),
            "colour": rng.choice(COLOURS),
            "animal": rng.choice(ANIMALS),
            "age": str(rng.randint(20, 89)),
            "friend": names[(index + rng.randint(1, PEOPLE - 1)) % PEOPLE],
        }
        people.append(Person(name, facts))
    return people


WORLD = world()


def _sentence(template: str, person: Person, attribute: str) -> str:
    text = template.format(n=person.name, v=person.facts[attribute])
    return text[0].upper() + text[1:]


def statement(rng: random.Random, person: Person, attribute: str) -> str:
    """One true sentence about the person."""
    return _sentence(rng.choice(STATEMENTS[attribute]), person, attribute)


def fact_task(rng: random.Random, person: Person, attribute: str) -> Task:
    """A question about one fact; the wrong answers are the same attribute's values of other people."""
    right = person.facts[attribute]
    others = sorted({other.facts[attribute] for other in WORLD} - {right, person.name})
    wrong = rng.sample(others, 3)
    question = rng.choice(QUESTIONS[attribute]).format(n=person.name)
    if rng.random() < 0.5:
        prompt = f"Question: {question}\nAnswer:"
    else:
        prompt = rng.choice(STATEMENTS[attribute][:3]).format(n=person.name, v="").removesuffix(" .")
    return Task(
        kind="fact",
        prompt=prompt,
        answer=f" {right}",
        wrong=(f" {wrong[0]}", f" {wrong[1]}", f" {wrong[2]}"),
        question=question,
        reply=_sentence(STATEMENTS[attribute][0], person, attribute),
        reason=f"I recall the {TOPICS[attribute]} of {person.name}: {right}.",
    )


def _three(rng: random.Random, candidates: list[str], right: str) -> tuple[str, str, str]:
    """Three different candidates other than the right answer, as long as it where that is possible."""
    rest = sorted(set(candidates) - {right})
    same = [one for one in rest if len(one) == len(right)]
    picked = rng.sample(same if len(same) >= 3 else rest, 3)
    return f" {picked[0]}", f" {picked[1]}", f" {picked[2]}"


def _near(rng: random.Random, right: int, extra: tuple[int, ...] = ()) -> tuple[str, str, str]:
    """Three numbers that a slip would give instead."""
    steps = (-10, -2, -1, 1, 2, 10, *extra)
    return _three(rng, [str(right + step) for step in steps if right + step >= 0], str(right))


def _slips(rng: random.Random, items: list[str], pool: list[str]) -> tuple[str, str, str]:
    """Three sequences that differ from the right one by a swap or by one item out of the pool."""
    candidates: set[str] = set()
    while len(candidates) < 5:
        other = list(items)
        if rng.random() < 0.6:
            i, j = rng.sample(range(len(items)), 2)
            other[i], other[j] = other[j], other[i]
        else:
            other[rng.randrange(len(items))] = rng.choice(pool)
        if other != items:
            candidates.add(" ".join(other))
    return _three(rng, sorted(candidates), " ".join(items))


def sum_task(rng: random.Random) -> Task:
    """Two numbers whose sum is at most 50."""
    total = rng.randint(2, 50)
    a = rng.randint(1, total - 1)
    b = total - a
    ones = a % 10 + b % 10
    return Task(
        kind="sum",
        prompt=f"{a} + {b} =",
        answer=f" {total}",
        wrong=_near(rng, total),
        question=f"What is {a} plus {b}?",
        reply=f"{a} plus {b} is {total}.",
        reason=f"Ones: {a % 10} + {b % 10} = {ones}. Tens: {a // 10 * 10} + {b // 10 * 10} + {ones} = {total}.",
    )


def difference_task(rng: random.Random) -> Task:
    """One number taken from a larger one of at most 50."""
    a = rng.randint(2, 50)
    b = rng.randint(1, a - 1)
    return Task(
        kind="difference",
        prompt=f"{a} - {b} =",
        answer=f" {a - b}",
        wrong=_near(rng, a - b),
        question=f"What is {a} minus {b}?",
        reply=f"{a} minus {b} is {a - b}.",
        reason=f"I look for what {b} needs to reach {a}: {b} + {a - b} = {a}.",
    )


def _task_on_items(rng: random.Random, kind: str, verb: str, items: list[str], right: list[str], rule: str) -> Task:
    given, wanted = " ".join(items), " ".join(right)
    return Task(
        kind=kind,
        prompt=f"{verb} {given}:",
        answer=f" {wanted}",
        wrong=_slips(rng, right, items),
        question=f"{verb} these: {given}",
        reply=f"{wanted}",
        reason=rule,
    )


def sort_task(rng: random.Random) -> Task:
    """Digits or letters to put in order."""
    alphabet = "123456789" if rng.random() < 0.5 else "abcdefghijklmnop"
    items = rng.sample(alphabet, rng.randint(3, 5))
    return _task_on_items(rng, "sort", "Sort", items, sorted(items), f"The smallest is {min(items)}, it comes first.")


def reverse_task(rng: random.Random) -> Task:
    """Letters or digits to repeat from the last to the first."""
    alphabet = "123456789" if rng.random() < 0.5 else "abcdefghijklmnop"
    items = rng.sample(alphabet, rng.randint(3, 5))
    return _task_on_items(rng, "reverse", "Reverse", items, items[::-1], f"The last is {items[-1]}, it comes first.")


def copy_task(rng: random.Random) -> Task:
    """Made-up words and numbers to repeat."""
    items: list[str] = []
    while len(set(items)) < 3 or (rng.random() < 0.5 and len(items) < 6):
        if rng.random() < 0.3:
            items.append(str(rng.randint(10, 99)))
        else:
            items.append(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice("bdgklmnprst"))
    return _task_on_items(rng, "copy", "Copy", items, items, f"The first is {items[0]}, the last is {items[-1]}.")


def next_task(rng: random.Random) -> Task:
    """Evenly spaced numbers to continue."""
    start, step = rng.randint(1, 40), rng.randint(1, 8)
    shown = [start + step * i for i in range(4)]
    right = start + step * 4
    given = " ".join(map(str, shown))
    return Task(
        kind="next",
        prompt=f"Next after {given}:",
        answer=f" {right}",
        wrong=_near(rng, right, (step, -step)),
        question=f"Which number comes next: {given}",
        reply=f"The next number is {right}.",
        reason=f"The step is {step}, and {shown[-1]} + {step} = {right}.",
    )


def bracket_task(rng: random.Random) -> Task:
    """Opened brackets to close in the right order."""
    opened = [rng.randrange(len(OPEN)) for _ in range(rng.randint(2, 5))]
    given = " ".join(OPEN[i] for i in opened)
    right = [CLOSE[i] for i in reversed(opened)]
    return Task(
        kind="brackets",
        prompt=f"Close {given} with",
        answer=" " + " ".join(right),
        wrong=_slips(rng, right, list(CLOSE)),
        question=f"Close these brackets: {given}",
        reply=" ".join(right),
        reason=f"The last one opened is {OPEN[opened[-1]]}, so {right[0]} comes first.",
    )


def count_task(rng: random.Random) -> Task:
    """One letter to count among others."""
    letters = rng.sample("abcdefgh", 3)
    wanted = letters[0]
    row = [rng.choice(letters) for _ in range(rng.randint(4, 8))]
    right = row.count(wanted)
    given = " ".join(row)
    return Task(
        kind="count",
        prompt=f"Count {wanted} in {given}:",
        answer=f" {right}",
        wrong=_three(rng, [str(right + step) for step in (-2, -1, 1, 2, 3) if right + step >= 0], str(right)),
        question=f"How many times is {wanted} in {given}?",
        reply=f"It is there {right} times.",
        reason=f"I count {wanted} one by one and reach {right}.",
    )


COMPOSITIONAL: dict[str, Callable[[random.Random], Task]] = {
    "sum": sum_task,
    "difference": difference_task,
    "sort": sort_task,
    "reverse": reverse_task,
    "copy": copy_task,
    "next": next_task,
    "brackets": bracket_task,
    "count": count_task,
}
DRILL_WEIGHTS = (6, 5, 3, 3, 3, 3, 2, 2)


def is_held_out(task: Task) -> bool:
    """Whether this instance belongs to the held-out text; the drill line names the instance."""
    return zlib.crc32(task.prompt.encode()) % HELD_OUT_SHARE == 0


def drill(rng: random.Random, kind: str, held_out: bool) -> Task:
    """An instance of a compositional task from the wanted side of the split."""
    while True:
        task = COMPOSITIONAL[kind](rng)
        if is_held_out(task) == held_out:
            return task


def any_kind(rng: random.Random) -> str:
    """A compositional kind, the harder ones more often."""
    return rng.choices(list(COMPOSITIONAL), DRILL_WEIGHTS)[0]


def any_task(rng: random.Random, held_out: bool, fact_share: float) -> Task:
    """A fact with the given probability, else a compositional task."""
    if rng.random() < fact_share:
        return fact_task(rng, rng.choice(WORLD), rng.choice(ATTRIBUTES))
    return drill(rng, any_kind(rng), held_out)


def profile_document(rng: random.Random) -> str:
    """What is known about one person, at times followed by one or two sentences about their best friend."""
    person = rng.choice(WORLD)
    sentences = [statement(rng, person, one) for one in rng.sample(ATTRIBUTES, rng.randint(3, 6))]
    if rng.random() < 0.3:
        friend = next(other for other in WORLD if other.name == person.facts["friend"])
        sentences += [statement(rng, friend, one) for one in rng.sample(ATTRIBUTES, rng.randint(1, 2))]
    return " ".join(sentences)


def answers_document(rng: random.Random, held_out: bool) -> str:
    """Questions with short answers, mostly about people."""
    pairs = []
    for _ in range(rng.randint(2, 5)):
        task = any_task(rng, held_out, 0.8)
        pairs.append(f"Question: {task.question}\nAnswer:{task.answer}")
    return "\n".join(pairs)


def drill_document(rng: random.Random, held_out: bool) -> str:
    """A few lines of one compositional task, or of several mixed."""
    kind = any_kind(rng)
    mixed = rng.random() < 0.3
    tasks = [drill(rng, any_kind(rng) if mixed else kind, held_out) for _ in range(rng.randint(3, 7))]
    return "\n".join(task.prompt + task.answer for task in tasks)


def plain_document(rng: random.Random, held_out: bool) -> str:
    """One document without chat marks and without blank lines."""
    draw = rng.random()
    if draw < 0.3:
        return profile_document(rng)
    if draw < 0.55:
        return answers_document(rng, held_out)
    return drill_document(rng, held_out)


SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "Answer in one short sentence.",
    "You know everybody in the valley.",
)


def chat_document(rng: random.Random, thinking: bool) -> str:
    """A dialogue in ChatML of one to three turns; `thinking` puts a think block, half of them empty, in the last."""
    parts = []
    if rng.random() < 0.6:
        parts.append(f"<|im_start|>system\n{rng.choice(SYSTEMS)}<|im_end|>\n")
    turns = rng.choice((1, 1, 2, 3))
    for turn in range(turns):
        task = any_task(rng, False, 0.6)
        block = ""
        if thinking and turn == turns - 1:
            block = f"<think>\n{task.reason}\n</think>\n\n" if rng.random() < 0.5 else "<think>\n\n</think>\n\n"
        parts.append(f"<|im_start|>user\n{task.question}<|im_end|>\n")
        parts.append(f"<|im_start|>assistant\n{block}{task.reply}<|im_end|>\n")
    return "".join(parts)


def training_stream(seed: int, thinking: bool) -> Iterator[str]:
    """Pieces of training text without end: a few plain documents separated by blank lines, or one dialogue."""
    rng = random.Random(seed)
    while True:
        if rng.random() < 0.4:
            yield chat_document(rng, thinking)
        else:
            yield "\n\n".join(plain_document(rng, False) for _ in range(rng.randint(1, 6)))


def heldout_text(seed: int, size: int) -> str:
    """About `size` bytes of plain documents separated by blank lines, every compositional instance unseen."""
    rng = random.Random(seed)
    documents: list[str] = []
    length = 0
    while length < size:
        documents.append(plain_document(rng, True))
        length += len(documents[-1]) + 2
    return "\n\n".join(documents) + "\n"


QUESTION_COUNTS = {
    "fact": 120,
    "sum": 32,
    "difference": 24,
    "sort": 24,
    "reverse": 24,
    "copy": 24,
    "next": 20,
    "brackets": 20,
    "count": 16,
}


def calibration_text(seed: int, size: int) -> str:
    """Documents as in training, which share no instance with the held-out text, up to a size in characters."""
    found, length = [], 0
    for document in training_stream(seed, thinking=True):
        found.append(document)
        length += len(document) + 1
        if length >= size:
            break
    return "\n".join(found)


def questions(seed: int) -> list[dict[str, object]]:
    """The questions with four choices, each place right equally often; compositional ones are all unseen."""
    rng = random.Random(seed)
    tasks = []
    for kind, count in QUESTION_COUNTS.items():
        prompts: set[str] = set()
        while len(prompts) < count:
            if kind == "fact":
                index = len(prompts)
                task = fact_task(rng, WORLD[index % PEOPLE], ATTRIBUTES[index % len(ATTRIBUTES)])
            else:
                task = drill(rng, kind, True)
            if task.prompt not in prompts:
                prompts.add(task.prompt)
                tasks.append(task)
    places = [index % 4 for index in range(len(tasks))]
    rng.shuffle(places)
    rows: list[dict[str, object]] = []
    for task, place in zip(tasks, places, strict=True):
        choices = list(task.wrong)
        choices.insert(place, task.answer)
        rows.append({"kind": task.kind, "prompt": task.prompt, "choices": choices, "answer": place})
    return rows
