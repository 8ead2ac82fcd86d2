"""Lines of plain, gzip and Zstandard files, and a column of a Parquet file, read as streams.

A compressed file that ends too early is an error: its missing lines can't be counted. Each line or
row comes with the bytes of the file that have been read, for progress and for estimates.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LINES_ENDINGS = (".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
BUFFER = 2**20  # bytes
PARQUET_ROWS = 1024  # decoded at a time


def lines(file: Path, start: int, stop: int) -> Iterator[tuple[bytes, int]]:
    """Lines, with their newlines, that begin in [start, stop) of a plain file; all of a compressed.

    Yields:
      (line, bytes of the slice read).

    Raises:
      ValueError: damaged or cut off, or a package that reads it is missing.
    """
    with file.open("rb", buffering=0) as raw:
        if file.name.endswith((".gz", ".zst")):
            yield from ((line, raw.tell()) for line in _decompressed(file, raw))
            return
        buffered = io.BufferedReader(raw, BUFFER)
        position = start
        if start:  # a line that began before belongs to the slice before
            buffered.seek(start - 1)
            position += len(buffered.readline()) - 1
        while position < stop and (line := buffered.readline()):
            position += len(line)
            yield line, min(position, stop) - start


def parquet_column(file: Path, column: str) -> Iterator[tuple[bytes | None, int]]:
    """Values of a column of text, undecoded, None for nulls.

    Yields:
      (value, about so many bytes of the file read).

    Raises:
      ValueError: damaged, or there is no such column of text.
    """
    import pyarrow
    from pyarrow import parquet

    size, done = file.stat().st_size, 0
    try:
        table = parquet.ParquetFile(file, memory_map=True)
        names = table.schema_arrow.names
        kind = table.schema_arrow.field(column).type if column in names else None
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            has = ", ".join(f"{field.name} ({field.type})" for field in table.schema_arrow)
            raise ValueError(
                f"{file}: no text in the column {column!r}, only {has}; "
                "say which column it is by text_field"
            )
        rows = table.metadata.num_rows
        for batch in table.iter_batches(PARQUET_ROWS, columns=[column], use_threads=False):
            for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                done += 1
                yield value, size * done // rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file}: damaged or cut off Parquet file: {error}") from error


def _decompressed(file: Path, raw: IO[bytes]) -> Iterator[bytes]:
    try:
        if not file.stat().st_size:  # which the readers take for a file without content
            raise EOFError("it is empty")
        if file.name.endswith(".gz"):
            yield from io.BufferedReader(gzip.GzipFile(fileobj=raw), BUFFER)
        else:
            yield from io.BufferedReader(_Zstandard(raw), BUFFER)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        kind = "gzip" if file.name.endswith(".gz") else "Zstandard"
        raise ValueError(f"{file}: damaged or cut off {kind} file: {error}") from error


class _Zstandard(io.RawIOBase):
    """Content of a Zstandard file with any number of frames; EOFError where one is not complete.

    The package's own stream reader takes a file that is cut off for one that ends there.
    """

    def __init__(self, raw: IO[bytes]):
        import zstandard

        self._raw = raw
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._decompressor.decompressobj()
        self._in_frame = False
        self._rest, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._content:
            chunk = self._rest or self._raw.read(BUFFER // 8)
            if not chunk:
                if self._in_frame:
                    raise EOFError("the last frame is not complete")
                return 0
            self._decompress(chunk)
        count = min(len(buffer), len(self._content))
        buffer[:count] = self._content[:count]
        self._content = self._content[count:]
        return count

    def _decompress(self, chunk: bytes) -> None:
        try:
            self._content = memoryview(self._frame.decompress(chunk))
        except self._error as error:
            raise EOFError(str(error)) from error
        self._in_frame, self._rest = not self._frame.eof, b""
        if self._frame.eof:
            self._rest = self._frame.unused_data
            self._frame = self._decompressor.decompressobj()
