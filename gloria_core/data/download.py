"""One file from the internet, for the few datasets that need no login: resumed where it stopped, checked at the end."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from gloria_core.data.files import file_hash

BLOCK = 1 << 20


class DownloadError(OSError):
    """A download failed or is not what it should be; the message names the address, the file and the remedy."""


def fetch(
    url: str,
    path: Path | str,
    *,
    sha256: str | None = None,
    timeout: float = 60,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Download `url` to `path`; a file that is there with the right checksum (or without one to compare) is kept.

    Bytes go to `path` + ".part" and the next call resumes from them by HTTP Range; a server that does not know Range
    starts anew. `progress(done, total)` is called about every MiB (total 0 if unknown).
    Raises DownloadError; what was read so far stays for the next call, unless its checksum is wrong.
    """
    path = Path(path)
    if path.is_file() and (sha256 is None or file_hash(path, digits=64) == sha256):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        total = _receive(url, part, timeout=timeout, progress=progress)
    except (urllib.error.URLError, OSError) as error:
        have = part.stat().st_size if part.is_file() else 0
        raise DownloadError(f"{url}: {error}; {have} bytes are in {part}, call again to resume") from error
    size = part.stat().st_size
    if total and size != total:
        raise DownloadError(f"{url}: {size} of {total} bytes arrived in {part}; call again to resume")
    found = file_hash(part, digits=64) if sha256 is not None else None
    if found != sha256:
        part.unlink()
        raise DownloadError(
            f"{url}: the SHA-256 is {found}, it should be {sha256}; removed, try again or another mirror"
        )
    part.replace(path)
    return path


def _receive(url: str, part: Path, *, timeout: float, progress: Callable[[int, int], None] | None) -> int:
    """Append what is missing to `part`; the whole size, 0 where the server does not say."""
    done = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing beyond what is there: it is whole, or not this file
            whole = (error.headers.get("Content-Range") or "").rpartition("/")[2]
            if whole == str(done):
                return done
            part.unlink()
            return _receive(url, part, timeout=timeout, progress=progress)
        raise
    with answer:
        resumed = answer.status == 206
        done = done if resumed else 0
        length = int(answer.headers.get("Content-Length") or 0)
        total = done + length if length else 0
        with part.open("ab" if resumed else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                done += len(block)
                if progress is not None:
                    progress(done, total)
    return total
