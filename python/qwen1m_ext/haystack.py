"""Needle-in-a-haystack prompts from text that every Python installation carries.

The haystack is English prose of the Python documentation (``pydoc_data.topics``); the demo
checkpoint was trained on *docstrings* of the standard library instead, so the haystack is held
out. All text is ASCII: with the demo checkpoint's byte-level tokenizer one character is one token.
Random numbers come from seeded ``random.Random`` objects, so that a seed gives the same prompt on
every machine whose Python ships the same documentation text.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_KEY_WORDS = """
    acorn almond amber anchor anvil apricot arrow autumn badger bamboo banjo barley basil beacon
    beaver birch bishop blanket bonnet bottle bramble brandy bronze bucket buffalo cabin cactus
    camel candle canyon carpet carrot castle cedar cellar cherry chimney cinnamon clover cobalt
    comet copper coral cotton cradle cricket crown crystal curtain daisy dancer desert diamond
    dolphin donkey dragon drum eagle ebony elbow elephant ember emerald falcon feather fiddle
    finch flamingo forest fountain fox galaxy garlic ginger giraffe glacier goblet gravel guitar
    hammer harbor harvest hazel hedgehog heron hickory honey hornet iceberg indigo island ivory
    jacket jaguar jasmine jigsaw jungle juniper kayak kettle kitchen kiwi ladder lagoon lantern
    lavender lemon leopard lily lobster lotus magnet mango maple marble meadow melon mirror mitten
    monkey mosaic muffin mustard nectar needle nickel nutmeg oasis ocean olive onion orchard
    orchid otter oyster paddle panther parrot peach pebble pelican pepper piano pigeon pillow
    pirate plum pony poplar prairie pumpkin puzzle quartz quilt rabbit radish raven ribbon river
    robin rocket rooster saddle saffron sailor salmon sandal scarlet shadow shepherd silver
    sparrow spider spruce squirrel stable starfish sugar sunset swan tailor teapot temple thistle
    thunder tiger timber tomato topaz trumpet tulip tundra turnip turtle umbrella valley vanilla
    velvet violet violin walnut walrus whale willow winter wizard wolf yellow zebra zephyr
    """

#: Names of the needles. The training recipe never uses them as keys.
KEY_WORDS = tuple(_KEY_WORDS.split())

# Parts of the standard library without prose, or not installed everywhere.
_SKIPPED_FOLDERS = {"__pycache__", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test",
                    "tests", "turtledemo"}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One retrieval question over one haystack.

    Attributes:
        prompt: Haystack and question; the model continues it with ``" 12345."``.
        question: The question alone, as a user would ask it.
        answer: The digits that must be generated.
        depth: Where the needle lies, from 0 (start of the haystack) to 1 (its end).
        num_keys: Number of needles in the haystack, of which one is asked.
        distance: Tokens of the demo checkpoint from the needle's digits to the end of the prompt.
    """

    prompt: str
    question: str
    answer: str
    depth: float
    num_keys: int
    distance: int


def needle(key: str, value: str) -> str:
    """Returns the sentence hidden in the haystack."""
    return f" The magic number of {key} is {value}."


def question(key: str) -> str:
    """Returns the question for one key."""
    return f"What is the magic number of {key}?"


def question_prompt(key: str) -> str:
    """Returns the end of a prompt: the question and the beginning of its answer."""
    return f"\nQuestion: {question(key)}\nAnswer: The magic number of {key} is"


def is_correct(generated: str, sample: Sample) -> bool:
    """Tells whether the generated text begins with exactly the digits asked for."""
    match = re.match(r"\s*(\d+)", generated)
    return match is not None and match.group(1) == sample.answer


def _ascii(text: str) -> str:
    """Returns text without accents, with plain quotes, and with '?' for all else not in ASCII."""
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2014: "-"})
    text = unicodedata.normalize("NFKD", text.expandtabs())
    text = "".join(c for c in text if not unicodedata.combining(c) and (c >= " " or c == "\n"))
    return text.encode("ascii", "replace").decode("ascii").replace("\x7f", "?")


@cache
def _held_out_sections() -> tuple[str, ...]:
    """Returns the sections of the documentation, in the order of their names."""
    from pydoc_data.topics import topics

    return tuple(_ascii(topics[name]).strip() + "\n\n" for name in sorted(topics))


def held_out_text(num_bytes: int, rng: random.Random) -> str:
    """Returns haystack text that the demo checkpoint was not trained on.

    The sections of the documentation come in random order. When they are used up (after 465 KB
    in Python 3.11) they follow again in another order, so any length can be asked for.

    Args:
        num_bytes: Length of the text; it is ASCII, so characters and bytes are the same.
        rng: Source of the order.
    """
    sections = list(_held_out_sections())
    pieces: list[str] = []
    length = 0
    while length < num_bytes:
        rng.shuffle(sections)
        # The first section begins anywhere, or short haystacks would all be section beginnings.
        start = rng.randrange(len(sections[0])) if not pieces else 0
        for index, section in enumerate(sections):
            pieces.append(section[start:] if index == 0 else section)
            length += len(pieces[-1])
            if length >= num_bytes:
                break
    return "".join(pieces)[:num_bytes]


def _docstrings(path: Path) -> Iterator[str]:
    """Yields the docstrings of a source file, outer ones first."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 40:
                yield _ascii(text)


@cache
def train_text() -> str:
    """Returns the training text: all docstrings of the standard library (1.6 MB in Python 3.11).

    Files are read in sorted order and repeated docstrings are dropped.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )  # fmt: skip
    texts = dict.fromkeys(text for path in files for text in _docstrings(path))
    return "\n\n".join(texts)


def make_sample(
    tokens: int,
    *,
    seed: int,
    competing_keys: int = 20,
    depth: float | None = None,
    asked: int = 0,
    alike: bool = False,
) -> Sample:
    """Makes a haystack of held-out text in which one of several keys is asked for.

    Samples that differ in `asked` alone share their haystack up to its last few characters, so that
    a cached prefix serves all of them.

    Args:
        tokens: Exact length of the prompt in characters (= tokens of the demo checkpoint).
        seed: Seed of everything random in the sample.
        competing_keys: Number of needles with different keys and values.
        depth: Place of the first needle, in [0, 1]; random if not given.
        asked: Index of the needle that is asked for.
        alike: Whether keys may begin alike (cedar and cellar), which is harder for a model that
            reads letters. Otherwise no two keys share their first two letters.

    Raises:
        ValueError: If the needles and the question do not fit, or the arguments are out of range.
    """
    most = len(KEY_WORDS) if alike else len({word[:2] for word in KEY_WORDS})
    if not 1 <= competing_keys <= most:
        raise ValueError(f"competing_keys={competing_keys}, expected 1 to {most}")
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth={depth}, expected a value in [0, 1]")
    if not 0 <= asked < competing_keys:
        raise ValueError(f"asked={asked}, expected 0 to {competing_keys - 1}")
    rng = random.Random(f"haystack {tokens} {competing_keys} {seed}")
    keys = rng.sample(KEY_WORDS, competing_keys if alike else len(KEY_WORDS))
    if not alike:  # the first word of each beginning, in the order drawn
        keys = list({word[:2]: word for word in reversed(keys)}.values())[-competing_keys:]
    values = [str(number) for number in rng.sample(range(10000, 100000), competing_keys)]
    depths = [rng.random() for _ in keys]
    if depth is not None:
        depths[0] = depth
    needles = [needle(key, value) for key, value in zip(keys, values, strict=True)]
    ends = [question_prompt(key) for key in keys]
    room = tokens - sum(len(sentence) for sentence in needles)
    # Needles are placed by the longest question, so that their places do not depend on `asked`.
    shared = room - max(len(end) for end in ends)
    if shared < 0:
        raise ValueError(f"tokens={tokens} is too short for {competing_keys} needles")
    text = held_out_text(room - len(ends[asked]), rng)
    pieces: list[str] = []
    begin = 0
    for place, sentence in sorted(zip(depths, needles, strict=True)):
        # Behind the word that the depth falls into.
        at = max(begin, round(place * shared))
        while at < shared and not text[at].isspace():
            at += 1
        pieces += [text[begin:at], sentence]
        begin = at
    pieces += [text[begin:], ends[asked]]
    prompt = "".join(pieces)
    sentence = needles[asked]
    distance = len(prompt) - prompt.index(sentence) - sentence.index(values[asked])
    return Sample(
        prompt, question(keys[asked]), values[asked], depths[asked], competing_keys, distance
    )
