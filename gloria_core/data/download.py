"""One file from the internet, for the few datasets that need no login: resumed where it stopped, checked at the end."""

import urllib.request
from collections.abc import Callable
from pathlib import Path

from gloria_core.data.files import file_hash

BLOCK, TIMEOUT = 1 << 20, 60  # bytes, seconds


class DownloadError(OSError):
    """A download failed or is not what it should be; the message names the address, the file and the remedy."""


def fetch(
    url: str, path: Path | str, *, sha256: str | None = None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Download `url` to `path`; nothing is done where `path` exists with the right checksum (or none is given).

    Bytes go to `path` + ".part" and the next call resumes from them by HTTP Range; a server that does not know Range
    starts anew. `progress(done, total)` is called about every MiB (total 0 if unknown).
    Raises DownloadError; what was read so far stays for the next call, unless its checksum is wrong.
    """
    path = Path(path)
    if path.is_file() and (sha256 is None or file_hash(path, digits=64) == sha256):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.is_file() else 0
    total = 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            done = done if answer.status == 206 else 0
            length = int(answer.headers.get("Content-Length") or 0)
            total = done + length if length else 0
            with part.open("ab" if done else "wb") as file:
                while block := answer.read(BLOCK):
                    file.write(block)
                    done += len(block)
                    if progress is not None:
                        progress(done, total)
    except OSError as error:
        if not done or getattr(error, "code", None) != 416:
            raise DownloadError(f"{url}: {error}; {done} bytes are in {part}, call again to resume") from error
        # nothing lies beyond what was read: it is the whole file, or another one
        if (error.headers.get("Content-Range") or "").rpartition("/")[2] != str(done):
            part.unlink()
            return fetch(url, path, sha256=sha256, progress=progress)
    if total and done != total:
        raise DownloadError(f"{url}: {done} of {total} bytes arrived in {part}; call again to resume")
    if sha256 is not None and (actual := file_hash(part, digits=64)) != sha256:
        part.unlink()
        raise DownloadError(f"{url}: the SHA-256 is {actual} and not {sha256}; removed, try again or another mirror")
    part.replace(path)
    return path
