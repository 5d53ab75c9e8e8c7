"""Sessions on disk: the cache of a conversation as a file, loaded in seconds instead of prefilled.

    magic, 8 bytes | header length, uint64 | header, JSON | SHA-256 of the header
    token ids, uint32 | SHA-256
    for each layer: K pages, raw | SHA-256 | V pages, raw | SHA-256

Numbers are little-endian. A page is [kv_heads, 128, head_dim] as in the pool; rows beyond the last
token are zero, so nothing of another conversation gets into a file. The header says what cached
keys depend on: weights (a fingerprint), positions, temperature, dtype, scales and shapes of the
cache. A file is checked against the engine before its first page is read, and every part against
its sum.

A file appears under its name only when it is complete and on the disk: it is written beside it,
synced and renamed. Whatever interrupts that leaves an older file of the name as it was.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from .errors import RequestError, SessionFileError
from .kv_cache import pages_for
from .ops import PAGE_SIZE
from .weights import fingerprint

if TYPE_CHECKING:
    from .engine import Engine
    from .sessions import Session

MAGIC = b"Q1MSESS1"
SUFFIX = ".q1ms"
_SUM_BYTES = 32
_BLOCK_BYTES = 8 << 20  # read, summed and written at a time
_MAX_HEADER = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """What cached keys and values depend on besides the tokens. Equal keys: interchangeable."""

    weights: str  # see `weights.fingerprint`
    chunk_size: int
    local_size: int
    original_max_position_embeddings: int | None
    rope_theta: float
    attention: str  # policy of the prefill
    dtype: str  # of the cache
    kv_exponents: dict[str, list[list[int]]] | None = None  # scales in fp8, see `kv_scales.py`
    num_layers: int
    kv_heads: int
    head_dim: int
    page_size: int
    model: str  # the engine's `model_key`: all of this, and the rest of config.json


@dataclass(frozen=True)
class SessionInfo:
    """The header of a file, and where it lies."""

    name: str
    path: str
    file_bytes: int
    created: str  # ISO 8601, UTC
    model: str  # name of the checkpoint directory, for people
    key: CacheKey
    num_tokens: int
    token_sha256: str
    drawn: list[int]  # output tokens after these, which are not in the cache
    temperature: float | None
    freeze_temperature: bool


def cache_key(engine: Engine, attention: str) -> CacheKey:
    """The key of what an engine caches, prefilled under an attention policy."""
    config, dual_chunk = engine.config, engine.dual_chunk
    return CacheKey(
        weights=fingerprint(engine.model.weights),
        chunk_size=dual_chunk.chunk_size,
        local_size=dual_chunk.local_size,
        original_max_position_embeddings=dual_chunk.original_max_position_embeddings,
        rope_theta=config.rope_theta,
        attention=attention,
        dtype=str(engine.kv_dtype).removeprefix("torch."),
        kv_exponents=engine.kv_exponents,
        num_layers=config.num_layers,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=PAGE_SIZE,
        model=engine.model_key.hex(),
    )


def session_path(directory: Path, name: str) -> Path:
    """Where the session of a name lies. Raises RequestError if the name is no plain file name."""
    if not _NAME.fullmatch(name):
        raise RequestError(
            "session: expected 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-', the first a letter or "
            f"digit, got {name!r}"
        )
    return directory / (name + SUFFIX)


def save_session(engine: Engine, session: Session, directory: Path, name: str) -> SessionInfo:
    """Write a session that no request is using; replaces a file of the same name.

    Raises:
        RequestError: a bad name, or nothing cached yet.
        OSError: no room, or not writable; a file of that name is still what it was.
    """
    path = session_path(directory, name)
    tokens = torch.tensor(session.token_ids, dtype=torch.int32)
    if not len(tokens):
        raise RequestError(f"session: expected cached tokens to save, {name!r} has none yet")
    pages = torch.tensor(session.sequence.pages[: pages_for(len(tokens))], dtype=torch.int64)
    token_bytes = _bytes_of(tokens)
    header = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": engine.model_dir.resolve().name,
        "key": asdict(cache_key(engine, session.policy)),
        "num_tokens": len(tokens),
        "token_sha256": hashlib.sha256(token_bytes).hexdigest(),
        "drawn": session.drawn,
        "temperature": session.temperature,
        "freeze_temperature": session.freeze_temperature,
    }
    head = json.dumps(header).encode()
    page_bytes = engine.cache.k[0][0].nbytes
    size = _file_bytes(len(head), len(tokens), 2 * len(engine.cache.k), page_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    free = shutil.disk_usage(directory).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size} bytes are needed, {free} are free", str(path))
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=directory)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            _write(file, MAGIC + struct.pack("<Q", len(head)) + head)
            _write(file, hashlib.sha256(head).digest())
            _write_summed(file, iter([token_bytes]))
            engine.cache.settle()
            with engine.device.scope():
                for pool in _pools(engine):
                    _write_summed(file, _page_blocks(pool, pages, len(tokens)))
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_directory(directory)
    return read_info(path)


def load_session(engine: Engine, path: Path) -> Session:
    """Open a session with the contents of a file, verified.

    Raises:
        SessionFileError: damaged, or of another model or configuration; the text says which.
        MemoryBudgetError: no room in the cache.
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        info, header_bytes = _read_header(file, path)
        _check_key(info, engine, path)
        pools, page_bytes = 2 * len(engine.cache.k), engine.cache.k[0][0].nbytes
        expected = _file_bytes(header_bytes, info.num_tokens, pools, page_bytes)
        if info.file_bytes != expected:
            raise SessionFileError(
                f"{path}: expected {expected} bytes, got {info.file_bytes}: the file is incomplete"
            )
        if info.num_tokens > engine.max_model_len:
            raise SessionFileError(
                f"{path}: expected at most max_model_len {engine.max_model_len} tokens, "
                f"got {info.num_tokens}"
            )
        tokens = torch.empty(info.num_tokens, dtype=torch.int32)
        _read_summed(file, [tokens], f"{path}: token ids")
        if hashlib.sha256(_bytes_of(tokens)).hexdigest() != info.token_sha256:
            raise SessionFileError(f"{path}: the token ids are not those of the header")
        if int(tokens.min()) < 0 or int(tokens.max()) >= engine.config.vocab_size:
            raise SessionFileError(f"{path}: expected token ids below {engine.config.vocab_size}")
        session = engine.open_session(freeze_temperature=info.freeze_temperature)
        try:
            session.sequence.append(info.num_tokens)
            pages = torch.tensor(session.sequence.pages, dtype=torch.int64)
            engine.cache.settle()
            with engine.device.scope():  # before any step that reads the pages
                for i, pool in enumerate(_pools(engine)):
                    what = f"{path}: {'keys' if i % 2 == 0 else 'values'} of layer {i // 2}"
                    _read_pages(file, pool, pages, what)
            session.token_ids = tokens.tolist()
            session.temperature, session.drawn = info.temperature, info.drawn
            session.policy = info.key.attention
        except BaseException:
            session.close()
            raise
    return session


def read_info(path: Path) -> SessionInfo:
    """Header of a file, checked against its sum; the pages are not read.

    Raises:
        SessionFileError: no session file, or a damaged header.
    """
    with open(path, "rb", buffering=0) as file:
        return _read_header(file, path)[0]


def list_sessions(directory: Path) -> Iterator[SessionInfo | SessionFileError]:
    """Every session of a directory by name; for a file that is none, why."""
    for path in sorted(directory.glob(f"[!.]*{SUFFIX}")):
        try:
            yield read_info(path)
        except SessionFileError as error:
            yield error
        except OSError as error:
            yield SessionFileError(f"{path}: {error.strerror}")


def remove_session(directory: Path, name: str) -> None:
    """Delete a file. Raises FileNotFoundError if there is none of that name."""
    session_path(directory, name).unlink()
    _sync_directory(directory)


# --- the format -----------------------------------------------------------------------------------


def _pools(engine: Engine) -> Iterator[Tensor]:
    """K and V of every layer, in the order of the file."""
    for k, v in zip(engine.cache.k, engine.cache.v, strict=True):
        yield k
        yield v


def _file_bytes(header: int, tokens: int, pools: int, page_bytes: int) -> int:
    """Size of a whole file."""
    parts = [len(MAGIC) + 8 + header, 4 * tokens, *[pages_for(tokens) * page_bytes] * pools]
    return sum(parts) + _SUM_BYTES * len(parts)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    view: memoryview = tensor.view(torch.uint8).flatten().numpy().data
    return view


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    """All of it: an unbuffered write may take a part only."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _write_summed(file: BinaryIO, blocks: Iterator[memoryview]) -> None:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
        _write(file, block)
    _write(file, digest.digest())


def _page_blocks(pool: Tensor, pages: Tensor, num_tokens: int) -> Iterator[memoryview]:
    """A sequence's pages of a pool, several at a time, zero beyond the last token."""
    step = max(1, _BLOCK_BYTES // pool[0].nbytes)
    for begin in range(0, len(pages), step):
        block = pool[pages[begin : begin + step].to(pool.device)].cpu()
        if begin + step >= len(pages) and num_tokens % PAGE_SIZE:
            block[-1, :, num_tokens % PAGE_SIZE :] = 0
        yield _bytes_of(block)


def _read_pages(file: BinaryIO, pool: Tensor, pages: Tensor, what: str) -> None:
    step = max(1, _BLOCK_BYTES // pool[0].nbytes)

    def blocks() -> Iterator[Tensor]:
        for begin in range(0, len(pages), step):
            part = pages[begin : begin + step]
            block = torch.empty(len(part), *pool.shape[1:], dtype=pool.dtype)
            yield block  # filled by the reader before it asks for the next
            pool[part.to(pool.device)] = block.to(pool.device)

    _read_summed(file, blocks(), what)


def _read_summed(file: BinaryIO, blocks: Any, what: str) -> None:
    digest = hashlib.sha256()
    for block in blocks:
        data = _bytes_of(block)
        _read_into(file, data, what)
        digest.update(data)
    stored = bytearray(_SUM_BYTES)
    _read_into(file, memoryview(stored), what)
    if digest.digest() != bytes(stored):
        raise SessionFileError(f"{what}: damaged (its checksum does not match)")


def _read_into(file: BinaryIO, target: memoryview, what: str) -> None:
    while target:
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise SessionFileError(f"{what}: the file ends too early")
        target = target[count:]


def _read_header(file: BinaryIO, path: Path) -> tuple[SessionInfo, int]:
    """(header, its bytes in the file)."""
    start = file.read(len(MAGIC) + 8)
    if start[: len(MAGIC)] != MAGIC:
        raise SessionFileError(f"{path}: not a session file of this version (no {MAGIC!r})")
    length = struct.unpack("<Q", start[len(MAGIC) :].ljust(8, b"\xff"))[0]
    if length > _MAX_HEADER:
        raise SessionFileError(f"{path}: damaged header (a length of {length} bytes)")
    head = bytearray(length)
    stored = bytearray(_SUM_BYTES)
    _read_into(file, memoryview(head), f"{path}: header")
    _read_into(file, memoryview(stored), f"{path}: header")
    if hashlib.sha256(head).digest() != bytes(stored):
        raise SessionFileError(f"{path}: damaged header (its checksum does not match)")
    try:
        fields = json.loads(head)
        fields["key"] = CacheKey(**fields["key"])
        size = os.fstat(file.fileno()).st_size
        info = SessionInfo(path.name.removesuffix(SUFFIX), str(path), size, **fields)
    except (ValueError, TypeError, KeyError) as error:
        raise SessionFileError(f"{path}: a header of another version ({error})") from None
    return info, length


def _check_key(info: SessionInfo, engine: Engine, path: Path) -> None:
    """Refuse a file of another model or configuration, naming what differs."""
    sparse = engine.sparse.key if engine.sparse else "dense"
    attention = sparse if info.key.attention == sparse else "dense"
    own, stored = asdict(cache_key(engine, attention)), asdict(info.key)
    for field, value in own.items():
        if stored[field] != value:
            if field == "kv_exponents":
                value, stored[field] = "the scales", "others"  # too many to print
            raise SessionFileError(
                f"{path}: {field}: expected {value} (this engine's), got {stored[field]}: "
                "the session belongs to another model or configuration"
            )


def _remove_leftovers(path: Path) -> None:
    """Temporary files of a process that was killed while it wrote this session."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(FileNotFoundError):
            leftover.unlink()


def _sync_directory(directory: Path) -> None:
    """Make a rename or removal in it survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
