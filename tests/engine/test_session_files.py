"""Sessions on disk: the same answers after a restart, and no damaged or foreign file ever used."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.checkpoints import model_config, write_checkpoint
from lib.hold import PATIENCE
from qwen1m_ext import SamplingParams
from qwen1m_ext.cli import main
from qwen1m_ext.engine import Engine
from qwen1m_ext.errors import RequestError, SessionFileError
from qwen1m_ext.session_files import (
    MAGIC,
    list_sessions,
    load_session,
    read_info,
    remove_session,
    save_session,
    session_path,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPT = [
    (7 * i + i * i) % 250 for i in range(300)
]  # 3 pages, the last not full; beyond trained 64


@pytest.fixture(scope="module")
def engine(checkpoint):
    return Engine(checkpoint, max_model_len=1024, prefill_chunk_tokens=100)


def ask(engine, session, prompt):
    handle = engine.submit(prompt, GREEDY, session=session)
    output = handle.result()
    assert handle.wait(PATIENCE)
    return output.outputs[0].token_ids, output.num_cached_tokens


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory):
    """(directory, prompt of the next turn, its answer, cached tokens) of a frozen session."""
    directory = tmp_path_factory.mktemp("saved")
    session = engine.open_session(freeze_temperature=True)
    answer, _ = ask(engine, session, PROMPT)
    save_session(engine, session, directory, "book")
    follow = [*PROMPT, *answer, 65, 66, 67]
    expected, cached = ask(engine, session, follow)
    session.close()
    assert cached >= len(PROMPT)
    return directory, follow, expected, cached


def test_a_loaded_session_goes_on_as_the_saved_one(engine, saved):
    directory, follow, expected, cached = saved
    used = engine.stats().pages_used
    session = load_session(engine, directory / "book.q1ms")
    assert ask(engine, session, follow) == (expected, cached)
    session.close()
    assert engine.stats().pages_used == used


def test_another_process_loads_it(checkpoint, saved):
    directory, follow, expected, cached = saved
    fresh = Engine(checkpoint, max_model_len=600, prefill_chunk_tokens=64)
    session = load_session(fresh, directory / "book.q1ms")
    assert ask(fresh, session, follow) == (expected, cached)


def test_the_header_tells_what_it_is(engine, saved):
    info = read_info(saved[0] / "book.q1ms")
    assert info.name == "book" and info.model == engine.model_dir.name
    assert info.num_tokens >= len(PROMPT) and info.freeze_temperature
    assert info.temperature == pytest.approx(engine.dual_chunk.temperature(len(PROMPT)))
    assert info.file_bytes == os.path.getsize(saved[0] / "book.q1ms")
    assert (saved[0] / "book.q1ms").stat().st_mode & 0o077 == 0  # conversations are private


def test_nothing_of_others_gets_into_a_file(engine, tmp_path):
    """The last page is handed out dirty: what lies beyond the session's tokens stays out."""
    for pool in (*engine.cache.k, *engine.cache.v):
        pool.fill_(12345.0)
    session = engine.open_session()
    ask(engine, session, [1, 2, 3])
    save_session(engine, session, tmp_path, "short")
    session.close()
    marker = torch.full((4,), 12345.0, dtype=engine.dtype).view(torch.uint8).numpy().tobytes()
    assert marker not in (tmp_path / "short.q1ms").read_bytes()


@settings(max_examples=60)
@given(data=st.data())
def test_any_changed_byte_is_noticed(engine, saved, tmp_path, data):
    good = (saved[0] / "book.q1ms").read_bytes()
    parts = [(0, 16), (16, 900), (900, 4000), (0, len(good))]  # the small parts more often
    low, high = data.draw(st.sampled_from(parts))
    at = data.draw(st.integers(low, high - 1))
    flip = data.draw(st.integers(1, 255))
    bad = tmp_path / "bad.q1ms"
    bad.write_bytes(good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
    used, rows = engine.stats().pages_used, engine.cache.free_rows
    with pytest.raises(SessionFileError, match=r"bad\.q1ms"):
        load_session(engine, bad)
    assert (engine.stats().pages_used, engine.cache.free_rows) == (used, rows)


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.5, 0.999])
def test_a_cut_file_is_noticed(engine, saved, tmp_path, share):
    good = (saved[0] / "book.q1ms").read_bytes()
    bad = tmp_path / "cut.q1ms"
    bad.write_bytes(good[: int(share * len(good))])
    with pytest.raises(SessionFileError, match="cut"):
        load_session(engine, bad)
    bad.write_bytes(good + b"x")
    with pytest.raises(SessionFileError, match="bytes"):
        load_session(engine, bad)


def header_with(good: bytes, **changes) -> bytes:
    """The file with another header, its sum put right: what a foreign writer would produce."""
    import hashlib

    length = struct.unpack("<Q", good[8:16])[0]
    head = json.loads(good[16 : 16 + length])
    for name, value in changes.items():
        (head["key"] if name in head["key"] else head)[name] = value
    text = json.dumps(head).encode()
    start = MAGIC + struct.pack("<Q", len(text)) + text + hashlib.sha256(text).digest()
    return start + good[16 + length + 32 :]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "0" * 32}, "weights"),
        ({"chunk_size": 128}, "chunk_size: expected 64 .* got 128"),
        ({"dtype": "bfloat16"}, "dtype: expected float32 .* got bfloat16"),
        ({"rope_theta": 5e6}, "rope_theta"),
        ({"attention": "sparse"}, "attention"),
        ({"model": "0" * 64}, "model"),
        ({"token_sha256": "0" * 64}, "token ids"),
        ({"num_tokens": 5000}, "bytes"),
        ({"extra": 1}, "another version"),
    ],
    ids=str,
)
def test_a_foreign_file_is_refused_with_the_reason(engine, saved, tmp_path, changes, words):
    path = tmp_path / "foreign.q1ms"
    path.write_bytes(header_with((saved[0] / "book.q1ms").read_bytes(), **changes))
    with pytest.raises(SessionFileError, match=words):
        load_session(engine, path)


def test_another_models_session_is_refused(saved, tmp_path):
    """Same shapes, other weights."""
    other = Engine(write_checkpoint(tmp_path / "other", seed=1, gain=2.0), max_model_len=1024)
    with pytest.raises(SessionFileError, match="weights"):
        load_session(other, saved[0] / "book.q1ms")
    config = model_config(rope_theta=20000.0)
    moved = Engine(write_checkpoint(tmp_path / "moved", config, gain=2.0), max_model_len=1024)
    with pytest.raises(SessionFileError, match="rope_theta"):
        load_session(moved, saved[0] / "book.q1ms")


def test_a_context_that_is_too_short_is_refused(checkpoint, saved):
    small = Engine(checkpoint, max_model_len=256)
    with pytest.raises(SessionFileError, match="max_model_len 256"):
        load_session(small, saved[0] / "book.q1ms")


def test_names_stay_in_their_directory(engine, tmp_path):
    for name in ("../x", "", ".hidden", "a/b", "a" * 65, "x\n", "ü"):
        with pytest.raises(RequestError, match="session"):
            session_path(tmp_path, name)
    session = engine.open_session()
    with pytest.raises(RequestError, match="none yet"):
        save_session(engine, session, tmp_path, "empty")
    session.close()


def test_list_and_remove(saved, tmp_path):
    good = (saved[0] / "book.q1ms").read_bytes()
    (tmp_path / "a.q1ms").write_bytes(good)
    (tmp_path / "b.q1ms").write_bytes(b"something else")
    (tmp_path / "notes.txt").write_text("")
    first, second = list_sessions(tmp_path)
    assert first.name == "a" and isinstance(second, SessionFileError)
    remove_session(tmp_path, "a")
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".q1ms"] == ["b.q1ms"]
    with pytest.raises(FileNotFoundError):
        remove_session(tmp_path, "a")


# --- crashes --------------------------------------------------------------------------------------

WRITER = textwrap.dedent(
    """
    import os, resource, signal, sys
    from pathlib import Path
    from qwen1m_ext import SamplingParams
    from qwen1m_ext.engine import Engine
    from qwen1m_ext import session_files

    checkpoint, directory, how = sys.argv[1:]
    engine = Engine(checkpoint, max_model_len=1024)
    session = engine.open_session()
    handle = engine.submit(list(range(200)), SamplingParams(max_tokens=1), session=session)
    handle.result(); handle.wait()
    if how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    elif how == "kill":
        write, count = session_files._write, iter(range(100))
        def dying(file, data):
            if next(count) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, data)
        session_files._write = dying
    else:
        session_files.os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
    try:
        session_files.save_session(engine, session, Path(directory), "book")
    except OSError as error:
        print(error.errno)
    """
)


@pytest.mark.parametrize("how", ["kill", "kill-before-rename", "full"])
def test_what_interrupts_a_save_leaves_the_old_file(engine, checkpoint, saved, tmp_path, how):
    directory, follow, expected, cached = saved
    target = tmp_path / "book.q1ms"
    target.write_bytes((directory / "book.q1ms").read_bytes())
    run = subprocess.run(
        [sys.executable, "-c", WRITER, str(checkpoint), str(tmp_path), how],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    left = [p.name for p in tmp_path.iterdir() if p.name != "book.q1ms"]
    if how == "full":
        assert run.stdout.strip() == str(errno.EFBIG), run.stderr
        assert left == []
    else:
        assert run.returncode == -9, run.stderr
        assert len(left) == 1  # what the dead process could not clear away
    session = load_session(engine, target)
    assert ask(engine, session, follow) == (expected, cached)
    save_session(engine, session, tmp_path, "book")  # the next save does
    session.close()
    assert [p.name for p in tmp_path.iterdir()] == ["book.q1ms"]


def test_a_disk_without_room_is_seen_before_writing(engine, saved, tmp_path, monkeypatch):
    usage = dataclasses.make_dataclass("Usage", ["free"])(1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    session = load_session(engine, saved[0] / "book.q1ms")
    with pytest.raises(OSError, match="1000 are free") as caught:
        save_session(engine, session, tmp_path, "book")
    session.close()
    assert caught.value.errno == errno.ENOSPC and not list(Path(tmp_path).iterdir())


def test_on_the_command_line(checkpoint, tmp_path, capsys):
    text, where = tmp_path / "text.txt", ["--session-dir", str(tmp_path / "sessions")]
    text.write_text("Once upon a time " * 20)
    model = ["--model", str(checkpoint), "--max-model-len", "1024", "--temperature", "0"]
    assert main(["sessions", "save", "book", "-f", str(text), *where, *model, "-q"]) == 0
    assert "340 tokens" in capsys.readouterr().out
    assert main(["sessions", "list", *where]) == 0
    assert capsys.readouterr().out.startswith("book ")
    go_on = ["sessions", "load", "book", "there was", *where, *model, "--max-tokens", "8"]
    assert main(go_on) == 0
    shown = capsys.readouterr()
    assert main(["generate", text.read_text() + "there was", *model, "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out == shown.out
    assert main(["sessions", "load", "book", *where, *model]) == 0
    assert "340 tokens verified" in capsys.readouterr().err
    assert main(["sessions", "rm", "book", *where]) == 0
    assert main(["sessions", "rm", "book", *where]) == 2
    assert "no saved session 'book'" in capsys.readouterr().err
