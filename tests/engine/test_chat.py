"""`qwen1m chat`, driven through its standard input as a user would."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from qwen1m_ext import LLM, SamplingParams
from qwen1m_ext.chat import Chat, run_chat
from qwen1m_ext.errors import ContextTooLong

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def chat(llm: LLM) -> Chat:
    chat = Chat(llm, PARAMS, quiet=True)
    yield chat
    chat.close()


def test_turns_build_a_conversation_and_keep_the_cache(chat: Chat) -> None:
    first = chat.ask("a")
    second = chat.ask("b")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == first.outputs[0].text
    assert second.metrics.cached_tokens >= len(first.prompt_token_ids) - 1


def test_reset_and_system(llm: LLM) -> None:
    chat = Chat(llm, PARAMS, system="Be brief.", quiet=True)
    chat.ask("a")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    chat.close()


def test_a_refused_message_leaves_the_conversation(chat: Chat) -> None:
    chat.ask("a")
    before = list(chat.messages)
    with pytest.raises(ContextTooLong):
        chat.ask("x" * 2000)
    assert chat.messages == before
    chat.ask("b")


def test_a_whole_conversation(
    chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.txt").write_text("the text")
    lines = ["hello", "", f"/file {tmp_path / 'note.txt'}", "what?", "/file /nowhere", "/help",
             "/frob", "/reset", "again", "/exit", "never"]  # fmt: skip
    assert run_chat(chat, io.StringIO("\n".join(lines)), "") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 3
    assert "there is no /frob" in err and "there is no /help" not in err
    assert "8 characters attached" in err and "No such file" in err and "/reset" in err
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["again"]
