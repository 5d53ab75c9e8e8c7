"""`qwen1m chat`: a conversation on the terminal whose cache is kept between turns."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from .errors import Qwen1mError
from .llm import LLM
from .request import RequestOutput, SamplingParams
from .terminal import PrefillBar, closing_line
from .tokenizer import Message

HELP = """\
/file PATH   send a text file together with your next message
/reset       begin a new conversation
/help        show these lines
/exit        leave (so does the end of input)"""


class Chat:
    """A conversation: messages so far, the session that caches them, an attached file."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        *,
        system: str | None = None,
        freeze_temperature: bool = False,
        quiet: bool = False,
    ) -> None:
        """Open a session; `quiet` leaves out bar and closing lines."""
        self._llm, self._params, self._quiet = llm, params, quiet
        self._system = [{"role": "system", "content": system}] if system else []
        self._session = llm.open_session(freeze_temperature=freeze_temperature)
        self.messages: list[Message] = list(self._system)
        self._attachment = ""

    def reset(self) -> None:
        """Forget the conversation; the cache is cut back by the next turn."""
        self.messages, self._attachment = list(self._system), ""

    def attach(self, path: str) -> int:
        """Read a file for the next message; returns its characters."""
        text = Path(path).expanduser().read_text(encoding="utf-8")
        self._attachment += text + "\n"
        return len(text)

    def ask(self, text: str) -> RequestOutput:
        """Send a message and stream the answer to stdout.

        A message that is refused or interrupted leaves the conversation as it was.
        """
        message: Message = {"role": "user", "content": self._attachment + text}
        tokenizer = self._llm.get_tokenizer()
        prompt = tokenizer.apply_chat_template([*self.messages, message])
        ids = tokenizer.encode(prompt)
        bar = None if self._quiet else PrefillBar(len(ids))
        stream = self._llm.stream(
            {"prompt_token_ids": ids}, self._params, on_progress=bar, session=self._session
        )
        shown = 0
        try:
            for output in stream:
                if bar and output.metrics.output_tokens == 1:
                    bar.close()
                answer = output.outputs[0].text
                print(answer[shown:], end="", flush=True)
                shown = len(answer)
        finally:
            if bar:
                bar.close()
        print(flush=True)
        self.messages += [message, {"role": "assistant", "content": answer}]
        self._attachment = ""
        if not self._quiet:
            print(closing_line(output.metrics), file=sys.stderr)
        return output

    def close(self) -> None:
        """Give the cache back."""
        self._session.close()


def run_chat(chat: Chat, lines: Iterable[str], prompt: str) -> int:
    """Serve a conversation line by line; a bad message is reported and the chat goes on."""
    print(prompt, end="", flush=True)
    for line in lines:
        text = line.strip()
        command, _, argument = text.partition(" ")
        try:
            if command == "/exit":
                break
            if command == "/reset":
                chat.reset()
            elif command == "/file":
                print(f"{chat.attach(argument):,} characters attached", file=sys.stderr)
            elif command.startswith("/"):
                if command != "/help":
                    print(f"there is no {command}; what there is:", file=sys.stderr)
                print(HELP, file=sys.stderr)
            elif text:
                chat.ask(text)
        except KeyboardInterrupt:
            print("\n(stopped; the cache keeps what was computed)", file=sys.stderr)
        except (Qwen1mError, OSError, UnicodeDecodeError) as error:
            print(f"qwen1m: error: {error}", file=sys.stderr)
        print(prompt, end="", flush=True)
    if prompt:
        print()
    return 0
