"""Training sequences: prose with many needles and many questions about them, built from a seed.

A token is a byte; three special tokens follow. A sequence is text filler with *needles* (key and
value) and *queries* (the key again, whose value must be recalled) spread through it. Every query
is a retrieval example, so one sequence of 2048 tokens holds up to 60 of them; a single question at
the end of each sequence would need far more training steps.
"""

from __future__ import annotations

import importlib.util
import random
import re
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

VOCAB_SIZE = 272  # 256 bytes, 3 special tokens, 13 unused
END_OF_TEXT, IM_START, IM_END = 256, 257, 258

# Classes of a token, which decide the weight of its loss.
NO_LOSS, TEXT, ANSWER, FIRST = range(4)  # FIRST: first byte of an answer, the retrieval itself

# Inside the builder the special tokens are bytes that ASCII text cannot contain.
_SPECIAL = {END_OF_TEXT: b"\xff", IM_START: b"\xfe", IM_END: b"\xfd"}
_EOT, _START, _END = _SPECIAL[END_OF_TEXT], _SPECIAL[IM_START], _SPECIAL[IM_END]

_GRASS = (
    b"The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_ATTRIBUTE_NAMES = """magic number, secret code, access code, phone number, room number, PIN, token,
    serial number, password, account, order id, locker code, ticket number, license, price, port,
    zip code, vault code, badge number, flight, score, address, key, pass phrase, index, value,
    birthday, weight, height, color code, gate, batch number, invoice, deposit, checksum, id,
    number, name, code, signature, extension"""
_ATTRIBUTES = [name.strip().encode() for name in _ATTRIBUTE_NAMES.split(",")]
_LETTERS = string.ascii_lowercase


def load_haystack() -> ModuleType:
    """Imports haystack.py by its path: it is pure Python, training needs no built package."""
    path = Path(__file__).resolve().parents[2] / "python" / "qwen1m_ext" / "haystack.py"
    spec = importlib.util.spec_from_file_location("tiny_haystack", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def encode(data: bytes) -> np.ndarray:
    """Returns token ids of builder bytes."""
    ids = np.frombuffer(data, np.uint8).astype(np.int64)
    for token, placeholder in _SPECIAL.items():
        ids[ids == placeholder[0]] = token
    return ids


class Marked:
    """Bytes with the class of each."""

    def __init__(self, *parts: tuple[bytes, int]) -> None:
        self.data = b"".join(data for data, _ in parts)
        self.classes = b"".join(
            bytes([FIRST]) + bytes([ANSWER]) * (len(data) - 1) if cls == FIRST
            else bytes([cls]) * len(data)
            for data, cls in parts
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.data)


@dataclass
class Pair:
    """A needle and its query; the chat fields are set for styles that can be asked in a chat."""

    needle: Marked
    query: Marked
    chat_question: bytes = b""
    chat_answer: Marked | None = None


class SequenceBuilder:
    """Builds the sequences of one training step.

    Args:
        text: Training prose.
        words: Words to use as keys.
        rng: Source of all choices; the caller seeds it with the number of the step, so that a
            resumed run sees the same data.
        official: Share of the queries in the official form. It is long; the short forms leave
            room for more competing needles in a sequence.
        dense: Whether sequences are mostly needles and queries instead of filler.
        near_values: Whether many values begin like another one of their sequence. Without them
            the model, having copied "63" of 63625, went on with another value: 63298.
    """

    def __init__(
        self,
        text: bytes,
        words: list[bytes],
        rng: random.Random,
        *,
        official: float = 0.3,
        dense: bool = False,
        near_values: bool = False,
    ) -> None:
        self.text, self.words, self.rng = text, words, rng
        self.official, self.dense, self.near_values = official, dense, near_values
        self.used_values: list[bytes] = []
        self.used: set[bytes] = set()
        self.attributes = [_ATTRIBUTES[0]]

    # Pieces

    def filler(self, length: int) -> bytes:
        """Returns filler of a length: mostly prose, some repetition, random words and numbers."""
        rng, kind = self.rng, self.rng.random()
        if length <= 0:
            return b""
        if kind < 0.8 or length < 8:
            start = rng.randrange(len(self.text) - length)
            return self.text[start : start + length]
        if kind < 0.86:
            start = rng.randrange(len(_GRASS))
            return (_GRASS * (length // len(_GRASS) + 2))[start : start + length]
        if kind < 0.93:
            return b" ".join(rng.choices(self.words, k=length // 4 + 2))[:length].ljust(length)
        forms = ("Entry %d: %05d ok. ", "[%d] code %05d is set. ", "%d, %d, ", "x%d is %d. ")
        return "".join(
            rng.choice(forms) % (rng.randrange(999), rng.randrange(100000))
            for _ in range(length // 8 + 2)
        ).encode()[:length]

    def key(self, focus: bool) -> bytes:
        """Returns an unused key; one in six is a near copy of a used one (a hard negative)."""
        rng = self.rng
        while True:
            kind = rng.random()
            if self.used and rng.random() < 0.17:
                near = bytearray(rng.choice(sorted(self.used)))
                near[rng.randrange(len(near))] = ord(rng.choice(_LETTERS))
                key = bytes(near)
            elif kind < (0.75 if focus else 0.55):
                key = rng.choice(self.words)
            elif kind < (0.8 if focus else 0.7):
                key = rng.choice(self.words) + rng.choice((b" ", b"-", b"_"))
                key += rng.choice(self.words)
            elif kind < 0.93:
                key = "".join(rng.choices(_LETTERS, k=rng.randint(3, 8))).encode()
            else:
                key = str(rng.randrange(10, 100000)).encode()
            if key not in self.used:
                self.used.add(key)
                return key

    def value(self, focus: bool) -> bytes:
        """Returns a value; repeated digits are frequent, because they confuse the copying."""
        rng, kind = self.rng, self.rng.random()
        if kind < (0.92 if focus else 0.7):
            length = rng.choice((3, 4, 5, 5, 5, 5, 6, 7)) if rng.random() < 0.5 else 5
            few = "".join(rng.choices(string.digits, k=3))
            alphabet = string.digits if rng.random() < 0.7 else few
            return "".join(rng.choices(alphabet, k=length)).encode()
        if kind < 0.82:
            return "".join(rng.choices("0123456789abcdef", k=rng.randint(4, 8))).encode()
        if kind < 0.95:
            return "".join(rng.choices(_LETTERS, k=rng.randint(4, 7))).encode()
        return rng.choice(self.words)

    def pair(self, style: str) -> Pair:
        """Returns a needle and a query in one of the styles."""
        rng = self.rng
        if style == "copy":
            if rng.random() < 0.5:
                alphabet = list((_LETTERS + string.digits + " ").encode())
                data = bytes(rng.choices(alphabet, k=rng.randint(14, 30)))
            else:
                data = b" ".join(rng.choices(self.words, k=rng.randint(3, 6)))
            return Pair(Marked((data, NO_LOSS)), Marked((data[:7], NO_LOSS), (data[7:], ANSWER)))
        focus = style == "magic"
        value = self.value(focus)
        if self.near_values:
            if self.used_values and rng.random() < 0.4:
                start = rng.choice(self.used_values)[: rng.randint(1, 3)]
                value = start + "".join(rng.choices(string.digits, k=5 - len(start))).encode()
            self.used_values.append(value)
        if style == "pass":
            return self._pass_key(value)
        key = self.key(focus)
        if style in ("magic", "of"):
            return self._property(rng.choice(self.attributes) + b" of " + key, value)
        middle, end = {
            "eq": (b"=", b";"),
            "col": (b": ", b"\n"),
            "is": (b" is ", b". "),
            "js": (b'": "', b'", '),
        }[style]
        head = (b'"' if style == "js" else b" ") + key + middle
        return Pair(
            Marked((head, TEXT), (value, NO_LOSS), (end, TEXT)),
            Marked((head, TEXT), (value, FIRST), (end, ANSWER)),
        )

    def _pass_key(self, value: bytes) -> Pair:
        rng = self.rng
        name = b"pass key" if rng.random() < 0.5 else rng.choice(_ATTRIBUTES)
        if name in self.used:
            name = rng.choice(self.words) + b" " + name
        self.used.add(name)
        start = (b" The " + name + b" is ", TEXT)
        if rng.random() < 0.7:
            found = Marked(
                start, (value, NO_LOSS), (b". Remember it. ", TEXT), (value, ANSWER),
                (b" is the " + name + b". ", TEXT),
            )  # fmt: skip
        else:
            found = Marked(start, (value, NO_LOSS), (b". ", TEXT))
        return Pair(found, *self._questions(name, value))

    def _property(self, name: bytes, value: bytes) -> Pair:
        found = Marked((b" The " + name + b" is ", TEXT), (value, NO_LOSS), (b".", TEXT))
        query, question, answer = self._questions(name, value)
        return Pair(found, query, question, answer)

    def _questions(self, name: bytes, value: bytes) -> tuple[Marked, bytes, Marked]:
        rng = self.rng
        question = b"What is the " + name + b"?"
        answer = (b"The " + name + b" is ", TEXT), (value, FIRST)
        kind = rng.random()
        if kind < self.official:  # the form of haystack.question_prompt
            # Mostly the turn ends here; else a haystack with a question in it goes on.
            end = b"." + _END if rng.random() < 0.7 else b".\n"
            head = b"\nQuestion: " + question + b"\nAnswer: "
            query = Marked((head, TEXT), *answer, (end, ANSWER))
        elif kind < self.official + 0.15:
            query = Marked((b" " + question + b" ", TEXT), *answer, (b".", ANSWER))
        else:
            query = Marked((b" ", TEXT), *answer, (b".", ANSWER))
        return query, question, Marked(*answer, (b"." + _END, ANSWER))

    # Sequences

    def _styles(self, length: int, focus: float) -> list[str]:
        rng = self.rng
        self.attributes = rng.sample(_ATTRIBUTES, rng.choice((1, 1, 2, 4)))
        if length <= 160:
            short = ("eq", "col", "is", "js", "copy", "eq copy", "of", "pass")
            return rng.choice(short).split()
        if rng.random() < focus:
            if rng.random() < 0.15:
                return ["pass"]
            self.attributes = [_ATTRIBUTES[0]]
            return ["magic"]
        mixes = ("of", "of", "pass", "pass of", "eq", "col", "is", "js", "copy", "of copy",
                 "pass eq of copy col js")  # fmt: skip
        return rng.choice(mixes).split()

    def _num_queries(self, length: int, styles: list[str]) -> tuple[int, ...]:
        if length <= 160:
            return (1, 1, 2)
        if styles != ["magic"]:
            return (1, 1, 2, 3)
        # Needles that nobody asks for are the competitors of the others.
        return (0, 1, 2, 3) if self.dense else (0, 0, 1, 1, 2)

    def sequence(self, length: int, focus: float) -> Marked:
        """Returns length + 1 tokens; `focus` is the share of sequences of the demo's own task."""
        rng = self.rng
        styles = self._styles(length, focus)
        self.used, self.used_values = set(), []
        askable = [style for style in styles if style in ("magic", "of", "pass")]
        head, tail, room = Marked(), Marked(), length + 1
        items: list[tuple[float, Marked]] = []
        used = 0
        if askable and length >= 256 and rng.random() < 0.25:  # ChatML, asked at the end
            pair = self.pair(rng.choice(askable))
            assert pair.chat_answer is not None
            turn = b"\n" + pair.chat_question + _END + b"\n" + _START + b"assistant\n"
            answer = pair.chat_answer
            tail = Marked((turn, TEXT), (answer.data, NO_LOSS))
            tail.classes = bytes([TEXT]) * len(turn) + answer.classes
            head = Marked((_START + b"user\n", NO_LOSS))
            room -= len(head) + len(tail)
            items.append((rng.random(), pair.needle))
            used += len(pair.needle)
        densities = (0.6, 0.8, 0.95, 0.95) if self.dense else (0.25, 0.5, 0.8, 0.95)
        density = rng.choice(densities) if length > 160 else 0.95
        while used < density * room:
            pair = self.pair(rng.choice(styles))
            queries = rng.choice(self._num_queries(length, styles))
            size = len(pair.needle) + queries * len(pair.query)
            if used + size > room:
                break
            used += size
            place = rng.random()
            items.append((place, pair.needle))
            for _ in range(queries):
                # Far questions are the harder ones, and DCA shows all far keys at such distances.
                far = 1 - rng.random() ** 2 if rng.random() < 0.6 else rng.random()
                items.append((place + (1 - place) * far + 1e-9, pair.query))
        items.sort(key=lambda item: item[0])
        parts = [head, *self._spread([item for _, item in items], room - used), tail]
        out = Marked()
        out.data = b"".join(part.data for part in parts)
        out.classes = b"".join(part.classes for part in parts)
        assert len(out) == length + 1 == len(out.classes)
        return out

    def _spread(self, items: list[Marked], gap: int) -> list[Marked]:
        """Returns the items with `gap` bytes of filler distributed between them."""
        rng = self.rng
        cuts = sorted(rng.randrange(gap + 1) for _ in range(min(len(items), 1 + gap // 24)))
        gaps = [end - start for start, end in zip([0, *cuts], [*cuts, gap], strict=True)]
        gaps += [0] * (len(items) + 1 - len(gaps))
        last = gaps.pop()
        rng.shuffle(gaps)
        parts: list[Marked] = []
        for item, length in zip(items, gaps, strict=True):
            parts += [Marked((self.filler(length), TEXT)), item]
        return [*parts, Marked((self.filler(last), TEXT))]


class TrainingData:
    """The batches of all steps; the batch of a step depends on the seed and the step only."""

    def __init__(self, seed: int) -> None:
        haystack = load_haystack()
        self.seed = seed
        self.text: bytes = haystack.train_text().encode("ascii")
        counts: dict[bytes, int] = {}
        for word in re.findall(rb"\b[a-z]{3,10}\b", self.text):
            counts[word] = counts.get(word, 0) + 1
        held_out = {word.encode() for word in haystack.KEY_WORDS}
        self.words = sorted(word for word, n in counts.items() if n >= 3 and word not in held_out)

    def batch(
        self,
        step: int,
        batch: int,
        length: int,
        *,
        focus: float,
        official: float,
        dense: bool,
        near_values: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids [batch, length + 1] and the classes of the predicted ones [batch, length]."""
        builder = SequenceBuilder(
            self.text,
            self.words,
            random.Random(f"{self.seed} {step}"),
            official=official,
            dense=dense,
            near_values=near_values,
        )
        rows = [builder.sequence(length, focus) for _ in range(batch)]
        ids = encode(b"".join(row.data for row in rows)).reshape(batch, length + 1)
        classes = np.frombuffer(b"".join(row.classes for row in rows), np.uint8)
        return ids, classes.reshape(batch, length + 1)[:, 1:]
