"""Arithmetic word problems that the package makes itself: data for a first run without a download or a licence.

A story is a text with slots and a plan; a plan draws small numbers and gives the steps of the answer. The stories of
the two splits share no sentence, but both have each plan: the test asks for what was learned, not what was memorised.

    Question  Mia fills 3 boxes with 8 shells each and has 4 shells left over. How many shells does Mia have altogether?
    Answer    3 * 8 = 24
              24 + 4 = 28
              #### 28
"""

import hashlib
import random
from collections.abc import Callable
from typing import NamedTuple

from dude_peft.data.formats import Message, Row
from dude_peft.errors import ConfigError
from dude_peft.show import quoted

SIZES = {"train": 4000, "test": 500}
"""The number of problems of each split; every seed gives other ones, none twice."""

_NAMES = (
    "Ada", "Ben", "Cleo", "Dan", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kira", "Leo", "Mia", "Noah",
    "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Victor", "Wendy", "Zoe",
)  # fmt: skip
_ITEMS = (
    "apples", "pencils", "marbles", "stamps", "shells", "coins", "buttons", "cards", "stickers", "ribbons", "beads",
    "pears", "plums", "crayons", "balloons", "toys", "nuts", "keys", "stones", "candles",
)  # fmt: skip


class _Dice:
    """Whole numbers drawn from random() alone: the one method whose sequence Python promises to keep."""

    def __init__(self, key: str) -> None:
        # Hashed, since Random(-1) is Random(1), and the two splits of a seed must not draw alike.
        self._random = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def shuffled(self, count: int) -> list[int]:
        """0 .. count-1 in random order (Fisher-Yates)."""
        order = list(range(count))
        for i in range(count - 1, 0, -1):
            j = self.between(0, i)
            order[i], order[j] = order[j], order[i]
        return order


_Draw = tuple[tuple[int, ...], tuple[str, ...]]
"""The numbers of the slots {a} {b} {c} {d}, and the steps of the answer."""


def _add(dice: _Dice) -> _Draw:
    a, b = dice.between(3, 60), dice.between(3, 60)
    return (a, b), (f"{a} + {b} = {a + b}",)


def _sub(dice: _Dice) -> _Draw:
    a, b = dice.between(3, 50), dice.between(3, 50)
    return (a + b, b), (f"{a + b} - {b} = {a}",)


def _mul(dice: _Dice) -> _Draw:
    a, b = dice.between(2, 12), dice.between(2, 12)
    return (a, b), (f"{a} * {b} = {a * b}",)


def _div(dice: _Dice) -> _Draw:
    q, b = dice.between(2, 12), dice.between(2, 10)
    return (q * b, b), (f"{q * b} / {b} = {q}",)


def _add_sub(dice: _Dice) -> _Draw:
    a, b = dice.between(5, 50), dice.between(3, 30)
    c = dice.between(2, a + b - 2)
    return (a, b, c), (f"{a} + {b} = {a + b}", f"{a + b} - {c} = {a + b - c}")


def _mul_add(dice: _Dice) -> _Draw:
    a, b, c = dice.between(2, 10), dice.between(2, 10), dice.between(2, 20)
    return (a, b, c), (f"{a} * {b} = {a * b}", f"{a * b} + {c} = {a * b + c}")


def _mul_sub(dice: _Dice) -> _Draw:
    a, b = dice.between(2, 10), dice.between(3, 10)
    c = dice.between(2, a * b - 2)
    return (a, b, c), (f"{a} * {b} = {a * b}", f"{a * b} - {c} = {a * b - c}")


def _add_mul(dice: _Dice) -> _Draw:
    a, b, c = dice.between(2, 12), dice.between(2, 12), dice.between(2, 8)
    return (a, b, c), (f"{a} + {b} = {a + b}", f"{a + b} * {c} = {(a + b) * c}")


def _sub_div(dice: _Dice) -> _Draw:
    q, b, c = dice.between(2, 10), dice.between(2, 20), dice.between(2, 8)
    return (q * c + b, b, c), (f"{q * c + b} - {b} = {q * c}", f"{q * c} / {c} = {q}")


def _add_div(dice: _Dice) -> _Draw:
    q, c = dice.between(2, 10), dice.between(2, 8)
    a = dice.between(1, q * c - 1) if q * c < 6 else dice.between(2, q * c - 2)
    return (a, q * c - a, c), (f"{a} + {q * c - a} = {q * c}", f"{q * c} / {c} = {q}")


def _div_sub(dice: _Dice) -> _Draw:
    q, b = dice.between(4, 12), dice.between(2, 8)
    c = dice.between(2, q - 2)
    return (q * b, b, c), (f"{q * b} / {b} = {q}", f"{q} - {c} = {q - c}")


def _times_both(dice: _Dice) -> _Draw:
    a, b = dice.between(2, 20), dice.between(2, 6)
    return (a, b), (f"{a} * {b} = {a * b}", f"{a * b} + {a} = {a * b + a}")


def _mul_mul_add(dice: _Dice) -> _Draw:
    a, b, c, d = (dice.between(2, 9) for _ in range(4))
    return (a, b, c, d), (f"{a} * {b} = {a * b}", f"{c} * {d} = {c * d}", f"{a * b} + {c * d} = {a * b + c * d}")


def _mul_add_sub(dice: _Dice) -> _Draw:
    a, b, c = dice.between(2, 9), dice.between(2, 9), dice.between(2, 15)
    d = dice.between(2, a * b + c - 2)
    full = a * b + c
    return (a, b, c, d), (f"{a} * {b} = {a * b}", f"{a * b} + {c} = {full}", f"{full} - {d} = {full - d}")


def _mul_sub_div(dice: _Dice) -> _Draw:
    a, b, d = dice.between(3, 9), dice.between(4, 9), dice.between(2, 5)
    q = dice.between(2, (a * b - 2) // d)
    c = a * b - q * d
    return (a, b, c, d), (f"{a} * {b} = {a * b}", f"{a * b} - {c} = {q * d}", f"{q * d} / {d} = {q}")


class _Story(NamedTuple):
    plan: Callable[[_Dice], _Draw]
    text: str


_TRAIN = (
    _Story(_add, "{name} has {a} {item}. {friend} gives {name} {b} more {item}. How many {item} does {name} have now?"),
    _Story(_add, "A shelf holds {a} {item} and a table holds {b} {item}. How many {item} are there in total?"),
    _Story(
        _add, "On Monday {name} found {a} {item}. On Tuesday {name} found {b} more. How many {item} is that in all?"
    ),
    _Story(_sub, "{name} had {a} {item} and lost {b} of them. How many {item} are left?"),
    _Story(_sub, "There were {a} birds on a roof. Then {b} of them flew away. How many birds stayed on the roof?"),
    _Story(_sub, "A book has {a} pages and {name} has read {b} of them. How many pages are still to be read?"),
    _Story(_mul, "{name} buys {a} bags with {b} {item} in each bag. How many {item} does {name} buy?"),
    _Story(_mul, "{name} buys {a} tickets for {b} dollars each. How many dollars do the tickets cost {name}?"),
    _Story(_mul, "{name} has a garden with {a} rows of {b} plants. How many plants grow in the garden?"),
    _Story(_mul, "{name} walks {a} miles every day. How many miles does {name} walk in {b} days?"),
    _Story(_div, "{name} shares {a} {item} equally among {b} friends. How many {item} does each friend get?"),
    _Story(_div, "Coach {name} splits {a} children into {b} teams of equal size. How many children are in each team?"),
    _Story(_div, "{name} cuts a rope of {a} feet into pieces of {b} feet. How many pieces are there?"),
    _Story(
        _add_sub,
        "{name} had {a} {item}, bought {b} more, and then gave away {c}. How many {item} does {name} still have?",
    ),
    _Story(
        _add_sub,
        "A bus carries {a} people. At the next stop {b} get on and {c} get off. How many people are on the bus?",
    ),
    _Story(
        _mul_add,
        "{name} fills {a} boxes with {b} {item} each and has {c} {item} left over. "
        "How many {item} does {name} have altogether?",
    ),
    _Story(
        _mul_add,
        "{name} earns {a} dollars an hour, works {b} hours and gets a tip of {c} dollars. "
        "How many dollars does {name} earn?",
    ),
    _Story(_mul_sub, "{name} bakes {a} trays of {b} muffins and sells {c} muffins. How many muffins remain?"),
    _Story(
        _mul_sub,
        "{name} saves {a} dollars a week for {b} weeks and then spends {c} dollars. "
        "How many dollars does {name} have after that?",
    ),
    _Story(
        _add_mul, "A sandwich costs {a} dollars and a drink costs {b} dollars. How many dollars do {c} of both cost?"
    ),
    _Story(_add_mul, "Each pupil gets {a} pens and {b} notebooks. How many things do {c} pupils get in all?"),
    _Story(
        _sub_div,
        "{name} has {a} {item}, keeps {b}, and splits the rest equally among {c} friends. "
        "How many {item} does every friend receive?",
    ),
    _Story(_sub_div, "Of {a} eggs, {b} are broken. The good ones go into boxes of {c}. How many boxes are filled?"),
    _Story(
        _times_both,
        "{name} has {a} {item}. {friend} has {b} times as many. How many {item} do {name} and {friend} have together?",
    ),
    _Story(
        _times_both,
        "{name} ran {a} laps at dawn and {b} times as many in the evening. How many laps did {name} run that day?",
    ),
    _Story(
        _add_div,
        "{name} picks {a} red and {b} green apples and packs {c} into each basket. How many baskets does {name} need?",
    ),
    _Story(
        _add_div,
        "One group has {a} pupils, another has {b}. They sit in {c} equal rows. How many pupils sit in each row?",
    ),
    _Story(
        _div_sub,
        "{name} and others, {b} children in all, share {a} {item} equally. {name} gives {c} away. "
        "How many {item} does {name} keep?",
    ),
    _Story(
        _div_sub,
        "A cake of {a} slices is shared by {b} tables. One table eats {c} slices. How many slices has it left?",
    ),
    _Story(
        _mul_mul_add,
        "{name} buys {a} pens at {b} dollars each and {c} books at {d} dollars each. How many dollars does {name} pay?",
    ),
    _Story(
        _mul_mul_add,
        "A farm has {a} stalls with {b} pigs each and {c} barns with {d} cows each. How many animals live on the farm?",
    ),
    _Story(
        _mul_add_sub,
        "{name} has {a} packs of {b} stickers, gets {c} more stickers and uses {d}. How many stickers are left over?",
    ),
    _Story(
        _mul_sub_div,
        "{name} makes {a} batches of {b} cookies, eats {c} of them, and puts the rest into {d} equal bags. "
        "How many cookies are in each bag?",
    ),
)

_TEST = (
    _Story(
        _add, "There are {a} {item} in the first drawer and {b} in the second. How many {item} are in both drawers?"
    ),
    _Story(_sub, "A shop opened with {a} {item} and sold {b} by noon. How many {item} were unsold?"),
    _Story(_mul, "{name} draws {a} pictures each week. How many pictures has {name} drawn after {b} weeks?"),
    _Story(_div, "{name} puts {a} {item} into {b} jars, the same number in each. How many {item} are in one jar?"),
    _Story(
        _add_sub,
        "A pond has {a} fish. Then {b} fish are added and {c} are caught. How many fish does the pond have at last?",
    ),
    _Story(
        _mul_add,
        "{name} plants {a} beds of {b} tulips, and {c} extra tulips by the door. How many tulips has {name} planted?",
    ),
    _Story(_mul_sub, "A cinema has {a} rows of {b} seats. People sit in {c} of the seats. How many seats are free?"),
    _Story(_add_mul, "A kit holds {a} screws and {b} nails. How many parts are in {c} kits?"),
    _Story(
        _sub_div,
        "A tank has {a} liters of water. First {b} liters leak out, then the rest fills buckets of {c} liters. "
        "How many buckets are full?",
    ),
    _Story(
        _add_div,
        "{name} has {a} dollars, {friend} has {b}. They spend it all on toys at {c} dollars each. How many toys is it?",
    ),
    _Story(
        _div_sub,
        "A team packs {a} {item} evenly into {b} crates. From one crate {c} are taken. How many stay in that crate?",
    ),
    _Story(
        _times_both,
        "{name} scored {a} points and {friend} scored {b} times as many. How many points did the two score in total?",
    ),
    _Story(
        _mul_mul_add,
        "A hall has {a} tables for {b} people and {c} benches for {d} people. How many people find a seat?",
    ),
    _Story(
        _mul_add_sub,
        "{name} loads {a} carts with {b} bricks each, adds {c} loose bricks and drops {d}. How many bricks arrive?",
    ),
    _Story(
        _mul_sub_div,
        "A baker has {a} bags of {b} rolls, sells {c} rolls and lays the others on {d} equal plates. "
        "How many rolls lie on each plate?",
    ),
)

_STORIES = {"train": _TRAIN, "test": _TEST}


def word_problems(n: int, *, seed: int = 0, split: str = "train") -> list[Row]:
    """The first `n` problems of a split for a seed, the same on each platform; a larger n begins with a smaller one's.

    Raises ConfigError where the split does not exist or does not have `n` problems (`SIZES`).
    """
    if split not in SIZES:
        raise ConfigError(f"builtin:word-problems has no split {quoted(split)}; use train or test")
    for key, value in (("number of word problems", n), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"the {key} is {quoted(value)}; give a whole number")
    if not 1 <= n <= SIZES[split]:
        raise ConfigError(f"builtin:word-problems has 1 to {SIZES[split]} {split} problems without repetition, not {n}")
    stories = _STORIES[split]
    dice = _Dice(f"{split}:{seed}")
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < n:
        for index in dice.shuffled(len(stories)):  # each story once a round: a short run sees every one
            question, answer = _problem(stories[index], dice)
            while question in seen:  # ends: each story has at least twice as many texts as its share of SIZES
                question, answer = _problem(stories[index], dice)
            seen.add(question)
            messages = (Message("user", question), Message("assistant", answer))
            rows.append(Row(messages, f"builtin:word-problems[{split}]:{len(rows)}"))
    return rows[:n]


def _problem(story: _Story, dice: _Dice) -> tuple[str, str]:
    numbers, steps = story.plan(dice)
    name = dice.between(0, len(_NAMES) - 1)
    friend = (name + dice.between(1, len(_NAMES) - 1)) % len(_NAMES)
    question = story.text.format(
        name=_NAMES[name],
        friend=_NAMES[friend],
        item=_ITEMS[dice.between(0, len(_ITEMS) - 1)],
        **dict(zip("abcd", numbers, strict=False)),
    )
    result = steps[-1].rpartition(" = ")[2]
    return question, "\n".join((*steps, f"#### {result}"))
