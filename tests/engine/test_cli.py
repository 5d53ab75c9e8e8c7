"""The command line as a user meets it: output, streams, exit status, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen1m_ext import terminal
from qwen1m_ext.cli import main, token_count


def qwen1m(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen1m_ext", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300)


def generate(
    checkpoint: Path, *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    return qwen1m(
        "generate", "--model", str(checkpoint), "--max-tokens", "4", "--ignore-eos",
        "--temperature", "0", *arguments, stdin=stdin,
    )  # fmt: skip


def test_generate_from_argument_file_and_stdin_agree(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("hello")
    runs = [
        generate(checkpoint, "hello"),
        generate(checkpoint, "--file", str(tmp_path / "prompt.txt")),
        generate(checkpoint, stdin="hello"),
        generate(checkpoint, "-", stdin="hello"),
    ]
    assert [r.returncode for r in runs] == [0] * 4, runs[0].stderr
    assert len({r.stdout for r in runs}) == 1 and runs[0].stdout.endswith("\n")
    last = runs[0].stderr.splitlines()[-1]
    for word in ("prompt 5 tokens", "TTFT", "output 4 tokens", "tok/s", "peak memory"):
        assert word in last
    assert "5/5 tokens" in runs[0].stderr


def test_quiet_prints_the_text_alone(checkpoint: Path) -> None:
    assert generate(checkpoint, "hello", "--quiet").stderr == ""


def test_chat_and_sampling_options_reach_the_engine(checkpoint: Path) -> None:
    plain = generate(checkpoint, "hello", "-q")
    chat = generate(checkpoint, "hello", "-q", "--chat", "--system", "Be brief.")
    hot = [generate(checkpoint, "hello", "-q", "--temperature", "9", "--seed", "5") for _ in "ab"]
    assert chat.stdout != plain.stdout and chat.returncode == 0
    assert hot[0].stdout == hot[1].stdout != plain.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--model", "/nowhere"], "qwen1m: error: model: expected a local"),
        (["generate", ""], "empty prompt"),
        (["generate", "x", "--file", "y"], "expected an argument or --file, got both"),
        (["generate", "--file", "/nowhere.txt"], "No such file"),
        (["generate", "x", "--top-p", "7"], "top_p: expected a number in (0, 1], got 7.0"),
        (["generate", "x", "--max-tokens", "0"], "expected a count such as 5000, 32k or 1m"),
        (["demo", "--tokens", "lots"], "expected a count such as 5000, 32k or 1m, got 'lots'"),
        (["frobnicate"], "invalid choice"),
    ],
)
def test_errors_are_one_line_and_status_2(
    checkpoint: Path, arguments: list[str], words: str
) -> None:
    if arguments[0] == "generate" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(checkpoint)]
    run = qwen1m(*arguments)
    assert run.returncode == 2 and words in run.stderr
    assert "Traceback" not in run.stderr and run.stdout == ""


def test_a_reader_that_leaves_is_no_error() -> None:
    """`qwen1m ... | head`: nothing on standard error."""
    config = Path(__file__).parents[1] / "fixtures" / "configs" / "qwen2.5-7b-instruct-1m.json"
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "qwen1m_ext", "plan", str(config), "--context", "1m"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, timeout=300)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["generate", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    assert "qwen1m_ext 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "count"),
    [("5000", 5000), ("8k", 8192), ("128K", 131072), ("1m", 10**6), ("1.5k", 1536)],
)
def test_token_counts(text: str, count: int) -> None:
    assert token_count(text) == count


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.24, "0.2 s"), (61, "61 s"), (725, "12 min 05 s"), (3725, "1 h 02 min")],
)
def test_seconds_for_a_person(seconds: float, text: str) -> None:
    assert terminal.format_seconds(seconds) == text
