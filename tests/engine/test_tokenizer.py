"""Encoding, chat templates and the detokeniser that must never show half a character."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.checkpoints import write_checkpoint
from qwen1m_ext.errors import ConfigError, RequestError
from qwen1m_ext.tokenizer import Detokenizer, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_checkpoint(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=50)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


@settings(max_examples=50)
@given(text=st.text(alphabet="aé漢🙂 \n", max_size=30))
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(i) for i in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_half_a_character_at_the_end_is_shown_by_flush(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(i) for i in "é".encode()[:1]] == [""]
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|im_end|>")
    assert ids == [97, 258]
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|>"
    assert tokenizer.token_id("<|im_end|>") == 258 and tokenizer.token_id("<|no|>") is None


def test_chat_template(tokenizer: Tokenizer) -> None:
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one message"),
        ([{"content": "x"}], r"messages\[0\]: expected an object with a role"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content: expected a string, got int"),
    ],
)
def test_bad_messages(tokenizer: Tokenizer, messages: list[dict[str, object]], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        tokenizer.apply_chat_template(messages)


def with_template(directory: Path, template: object) -> Path:
    write_checkpoint(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return directory


def test_a_template_can_refuse_and_cannot_reach_out(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    refusing = Tokenizer(with_template(tmp_path / "a", "{{ raise_exception('only tools') }}"))
    with pytest.raises(RequestError, match="chat template: only tools"):
        refusing.apply_chat_template(messages)
    nasty = Tokenizer(with_template(tmp_path / "b", "{{ ''.__class__.__mro__ }}"))
    with pytest.raises(RequestError, match="chat template: .*unsafe"):
        nasty.apply_chat_template(messages)
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    assert Tokenizer(with_template(tmp_path / "c", named)).apply_chat_template(messages) == "D"
    with pytest.raises(ConfigError, match="chat_template: expected a string, got int"):
        Tokenizer(with_template(tmp_path / "d", 5))


def test_a_template_file_wins(tmp_path: Path) -> None:
    directory = with_template(tmp_path, "from the json")
    (directory / "chat_template.jinja").write_text("from the file")
    text = Tokenizer(directory).apply_chat_template([{"role": "user", "content": ""}])
    assert text == "from the file"


def test_missing_or_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: file not found"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer(tmp_path)
    directory = write_checkpoint(tmp_path / "no_template")
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(directory).apply_chat_template([{"role": "user", "content": ""}])


def test_bytes_of_single_tokens(checkpoint):
    """Half a character has no text, but bytes."""
    tokenizer = Tokenizer(checkpoint)
    ids = tokenizer.encode("a\u00fc\u65e5")
    assert b"".join(map(tokenizer.token_bytes, ids)) == "a\u00fc\u65e5".encode()
    assert tokenizer.token_bytes(ids[1]) == b"\xc3"
    assert tokenizer.token_bytes(258) == b"<|im_end|>"


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    """A server's event loop must not stand still for the seconds that a million tokens take."""
    text, encoding, stop = "the sea " * 100_000, [0], threading.Event()

    def encode() -> None:
        while not stop.is_set():
            encoding[0] += 1
            tokenizer.encode(text)

    thread = threading.Thread(target=encode)
    thread.start()
    turns, end = Counter[int](), time.monotonic() + 60
    while max(turns.values(), default=0) <= 10 and time.monotonic() < end:
        time.sleep(0.001)
        turns[encoding[0]] += 1  # in one encoding; with the interpreter's lock held, one or two
    stop.set()
    thread.join()
    assert max(turns.values()) > 10
