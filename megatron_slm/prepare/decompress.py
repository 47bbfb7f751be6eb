"""Readers of .gz and .zst files that read all members or frames, and raise an error if a file is truncated.

The readers of other libraries do not suffice: most accept an empty file, zstandard's accepts a truncated one, and
pyarrow's cannot decode frames with large windows.
"""

import io
import zlib
from collections.abc import Callable
from typing import IO, Any

SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
_INPUT_BYTES = 1 << 13  # decoded at a time; zstd can expand them to at most 256 MB
_BUFFER_BYTES = 1 << 20
_GZIP = 31  # zlib's wbits for a gzip member with header and checksum
_LARGEST_WINDOW = 1 << 31  # bytes; the window of zstd --long=31, the largest that zstd reads


def decompressed(file: IO[bytes], compression: str) -> io.BufferedReader:
    """Return the content of a compressed file as a stream.

    Reading from it raises EOFError if the file is empty or ends inside a member or frame, and OSError if it is damaged.

    Args:
        file: the open file, at its beginning; it is closed with the stream.
        compression: "gzip" or "zstd".
    """
    return io.BufferedReader(_Members(file, *_DECODERS[compression]()), _BUFFER_BYTES)


def make_fsspec_strict() -> None:
    """Make fsspec, through which `datasets` reads, raise errors for empty and truncated .gz and .zst files.

    This changes the current process. Checked against fsspec 2026.9: `fsspec.compression.compr` is not documented.
    """
    from fsspec.compression import compr, register_compression

    theirs = compr["gzip"]
    if compr.get("zstd") is _open_zstd:
        return

    def open_gzip(file: IO[bytes], mode: str = "rb", **options: Any) -> Any:
        if "r" in mode:
            if not file.read(1):
                raise EOFError("a .gz file is empty")
            file.seek(0)
        return theirs(file, mode=mode, **options)

    register_compression("gzip", open_gzip, "gz", force=True)
    register_compression("zstd", _open_zstd, "zst", force=True)


def _open_zstd(file: IO[bytes], mode: str = "rb", **_: Any) -> io.BufferedReader:
    if "r" not in mode:
        raise ValueError("this process only reads .zst files")
    return decompressed(file, "zstd")


class _Members(io.RawIOBase):
    def __init__(self, file: IO[bytes], begin: Callable[[], Any], failure: type[Exception]) -> None:
        self._file, self._begin, self._failure = file, begin, failure
        self._member: Any = None  # the decoder of the current member; None between members
        self._input = b""  # read but not yet decoded
        self._content = memoryview(b"")  # decoded but not yet returned
        self._any = False  # True after the first complete member

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            data = self._input or self._file.read(_INPUT_BYTES)
            if not data:
                if self._member is None and self._any:
                    return 0
                raise EOFError("it is truncated" if self._any or self._member else "it is empty")
            self._content = memoryview(self._decode(data))
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._content))
        target[:size], self._content = self._content[:size], self._content[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decode(self, data: bytes) -> bytes:
        self._member = self._member or self._begin()
        try:
            content: bytes = self._member.decompress(data)
        except self._failure as error:
            raise OSError(str(error)) from error
        self._input = b""
        if self._member.eof:
            self._input, self._member, self._any = self._member.unused_data, None, True
        return content


def _gzip() -> tuple[Callable[[], Any], type[Exception]]:
    return lambda: zlib.decompressobj(_GZIP), zlib.error


def _zstd() -> tuple[Callable[[], Any], type[Exception]]:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj, zstandard.ZstdError


_DECODERS = {"gzip": _gzip, "zstd": _zstd}
