"""Brings one file from the Hub to the disk: taken up again where it stopped, and believed by its checksum alone.

huggingface_hub 2's own downloader begins each file anew in another process, so the bytes go through its session
(tokens, proxies, redirects) but are kept here: ``<path>.part`` until whole and verified. Called by the fetching child,
several at once in threads.
"""

import functools
import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm

from lmx.errors import ModelInvalid
from lmx.hub.download.hub import Patience
from lmx.hub.download.request import File

READ_BYTES = 4 * 1024 * 1024
MOST_HTTP_BYTES = 50 * 1000**3
"""The Hub gives larger files through Xet alone: huggingface_hub fetches those, and begins anew when it was ended."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """What the files of a download have in common."""

    repo: str
    revision: str
    folder: Path
    patience: Patience
    count: Callable[[int], None]
    """Gets the bytes that are there already; negative: thrown away."""
    came: Callable[[int], None]
    """Gets those that come."""

    def bring(self, file: File) -> None:
        """Make ``folder / file.path``, unless it is there: then it is whole.

        Raises ModelInvalid for what came damaged twice, LmxError, OSError or what the client raises.
        """
        path = self.folder / file.path
        if path.is_file():
            self.count(file.size)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        for attempt in range(2):
            if file.size > MOST_HTTP_BYTES and not unfinished.exists():
                self.patience.run(lambda: self._through_xet(file, unfinished))
            with _Part(unfinished, file) as part:
                # What Xet brought has been counted.
                if file.size <= MOST_HTTP_BYTES or attempt:
                    self.count(part.size)
                if part.size < file.size:
                    self.patience.run(functools.partial(self._append, file, part))
                whole = part.is_whole()
            if whole:
                unfinished.replace(path)
                return
            self.count(-part.size)
            unfinished.unlink()
        raise ModelInvalid(
            f"{file.path} of {self.repo} came damaged twice: its checksum is not the Hub's. Try again later; if "
            "HF_ENDPOINT or a proxy stands between, it may be at fault."
        )

    def _append(self, file: File, part: "_Part") -> None:
        headers = build_hf_headers(library_name="lmx", headers={"Accept-Encoding": "identity"})
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
        url = hf_hub_url(self.repo, file.path, revision=self.revision)
        with get_session().stream("GET", url, headers=headers) as response:
            hf_raise_for_status(response)
            start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
            if part.size and (response.status_code != 206 or start != str(part.size)):
                self.count(-part.size)  # it sends the whole file
                part.restart()
            for chunk in response.iter_bytes():
                part.write(chunk)
                self.came(len(chunk))
                if part.size > file.size:
                    return  # another file than was promised
        if part.size < file.size:
            raise httpx2.ReadError(f"{file.path} ended after {part.size} of {file.size} bytes")

    def _through_xet(self, file: File, unfinished: Path) -> None:
        apart = self.folder / f".xet-{file.blob}"
        came = 0

        class Counter(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

            def update(counter, n: float | None = 1) -> None:
                nonlocal came
                came += int(n or 0)
                self.came(int(n or 0))

        try:
            made = hf_hub_download(
                self.repo,
                file.path,
                revision=self.revision,
                local_dir=apart,
                library_name="lmx",
                tqdm_class=Counter,
            )
        except BaseException as error:
            self.count(-came)
            if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
                raise error.__cause__ from None  # why it looked on the disk
            raise
        self.count(file.size - came)
        Path(made).replace(unfinished)
        shutil.rmtree(apart, ignore_errors=True)


class _Part:
    """An unfinished file and its checksum, which goes along with what is written: nothing is read twice."""

    def __init__(self, path: Path, file: File) -> None:
        self._file = file
        self._opened = path.open("a+b", buffering=0)  # what a killed process had is on the disk
        self._opened.seek(0)
        self._begin()
        while data := self._opened.read(READ_BYTES):
            self._digest.update(data)
            self.size += len(data)

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _begin(self) -> None:
        self.size = 0
        if self._file.sha256:
            self._digest = hashlib.sha256()
        else:
            self._digest = hashlib.sha1(b"blob %d\0" % self._file.size)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._opened.write(rest) :]
        self._digest.update(data)
        self.size += len(data)

    def restart(self) -> None:
        self._opened.truncate(0)
        self._begin()

    def is_whole(self) -> bool:
        os.fsync(self._opened.fileno())
        return self.size == self._file.size and self._digest.hexdigest() == (self._file.sha256 or self._file.blob)
