"""Checkpoints in object storage (`checkpoint.remote`), with the promises of the folder: whole or absent, by digests.

    URL/step_00000100/{model/..., state.json}, then manifest.json, which makes it whole
    URL/latest, URL/best       names, as in run_dir/checkpoints

A store of objects has no renaming, but each object is there whole or not at all: so the manifest is written last and
removed first. Any protocol of fsspec; s3:// needs s3fs, gs:// gcsfs, abfs:// adlfs.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import fsspec
from fsspec.asyn import AsyncFileSystem

from r1engine import checkpoint
from r1engine.config import ConfigError

_TRANSFERS = 8  # files at once


class Remote:
    """A place of a run's checkpoints. One process uses it."""

    def __init__(self, url: str) -> None:
        """
        Args:
            url: of a folder of its own for the run, such as s3://bucket/runs/name.

        Raises:
            ConfigError: no such protocol, or its package is not installed.
        """
        self.url = url
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"checkpoint.remote: found {url}: {error}; required an address of fsspec with its package (of s3:// "
                "pip install 'r1engine[storage]')"
            ) from error
        self._root = root.rstrip("/")

    def check(self) -> None:
        """Write, read, list and remove an object, before a run needs it.

        Raises:
            ConfigError: one of these is refused; the message says which.
        """
        name, text = f".probe-{secrets.token_hex(8)}", secrets.token_hex(8)
        path, what = f"{self._root}/{name}", "write"
        try:
            self._make_folder(self._root)
            self._fs.pipe_file(path, text.encode())
            what = "read"
            is_same = self._fs.cat_file(path).decode() == text
            what = "list"
            is_listed = name in self._names()
            what = "remove"
            self._fs.rm_file(path)
        except Exception as error:  # each protocol has exceptions of its own
            raise ConfigError(
                f"checkpoint.remote: {self.url}: cannot {what} there ({_reason(error)}); required the right to write, "
                "read, list and remove objects"
            ) from error
        if not (is_same and is_listed):
            raise ConfigError(f"checkpoint.remote: {self.url}: found another object than was written, required a store")

    def upload(self, folder: Path, *, best: str | None) -> None:
        """Put a whole checkpoint there and name it as the latest one.

        Args:
            folder: of `checkpoint.commit`.
            best:   name of the one that is kept as the best.

        Raises:
            RuntimeError: it could not be put there whole; then it does not count.
        """
        target = f"{self._root}/{folder.name}"
        sizes = {name: entry["size"] for name, entry in checkpoint.read_files(folder).items()}
        try:
            if self._has(folder.name):  # this step was saved before, and differs
                self._fs.rm_file(f"{target}/manifest.json")
            self._each(sizes, lambda name: self._put(folder / name, f"{target}/{name}", sizes[name]))
            self._put(folder / "manifest.json", f"{target}/manifest.json", None)
            self._fs.pipe_file(f"{self._root}/latest", folder.name.encode())
            if best is not None and self._has(best):
                self._fs.pipe_file(f"{self._root}/best", best.encode())
        except Exception as error:
            raise RuntimeError(f"checkpoint.remote: {target}: cannot be uploaded: {_reason(error)}") from error

    def prune(self, keep: int) -> None:
        """Remove all but the `keep` newest checkpoints and those that are named, and what is not whole.

        Raises:
            RuntimeError: the store refuses.
        """
        try:
            whole = self.complete()
            kept = {*whole[:keep], self._read("latest"), self._read("best")}
            for name in self._names():
                if checkpoint.step_of(name) is not None and name not in kept:
                    if name in whole:
                        self._fs.rm_file(f"{self._root}/{name}/manifest.json")
                    self._fs.rm(f"{self._root}/{name}", recursive=True)
        except Exception as error:
            raise RuntimeError(f"checkpoint.remote: {self.url}: cannot be tidied: {_reason(error)}") from error

    def complete(self) -> list[str]:
        """Names of the checkpoints that are whole, newest first."""
        steps = {name: step for name in self._names() if (step := checkpoint.step_of(name)) is not None}
        return sorted((name for name in steps if self._has(name)), key=steps.__getitem__, reverse=True)

    def fetch(self, run_dir: Path, on_skip: Callable[[str], None]) -> Path | None:
        """Bring the one to go on from into the run folder: the latest one, else the newest other that is whole.

        Args:
            run_dir: of a run without checkpoints.
            on_skip: called with the reason for each one passed over.

        Returns:
            The folder; None if nothing is there.

        Raises:
            RuntimeError: there are some, but none is whole.
        """
        latest, best, names = self._read("latest"), self._read("best"), self.complete()
        names.sort(key=lambda name: name != latest)  # which keeps the order of the others
        if best in names[1:]:  # first: the last one that comes is the latest
            self._try_fetch(run_dir, best, on_skip)
        for name in names:
            if (folder := self._try_fetch(run_dir, name, on_skip)) is not None:
                return folder
        if names:
            raise RuntimeError(f"checkpoint.remote: {self.url} has {len(names)} checkpoint(s), none is whole")
        return None

    def _try_fetch(self, run_dir: Path, name: str, on_skip: Callable[[str], None]) -> Path | None:
        try:
            return self._fetch(run_dir, name)
        except (checkpoint.CorruptCheckpoint, OSError) as error:
            on_skip(f"{self.url}/{name}: {error}")
            return None

    def _fetch(self, run_dir: Path, name: str) -> Path:
        partial, source = checkpoint.begin(run_dir, checkpoint.step_of(name) or 0), f"{self._root}/{name}"
        (partial / "manifest.json").write_bytes(self._fs.cat_file(f"{source}/manifest.json"))
        files = checkpoint.read_files(partial)
        if outside := [file for file in files if ".." in PurePosixPath(file).parts or file.startswith("/")]:
            raise checkpoint.CorruptCheckpoint(f"manifest.json lists {outside[0]}, which is not in the checkpoint")
        checkpoint.free_space_check(partial, sum(entry["size"] for entry in files.values()))
        for file in files:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
        self._each(files, lambda file: self._fs.get_file(f"{source}/{file}", str(partial / file)))
        return checkpoint.adopt(partial)

    def _put(self, source: Path, target: str, size: int | None) -> None:
        self._make_folder(target.rpartition("/")[0])
        self._fs.put_file(str(source), target)
        if size is not None and (there := self._fs.info(target)["size"]) != size:
            raise OSError(f"{target} has {there} bytes, {source} {size}")

    def _make_folder(self, path: str) -> None:
        """Stores of objects, which fsspec reaches in a loop of its own, have none; s3fs would make a bucket."""
        if not isinstance(self._fs, AsyncFileSystem):
            self._fs.makedirs(path, exist_ok=True)

    def _each(self, names: dict, act: Callable[[str], None]) -> None:
        with ThreadPoolExecutor(_TRANSFERS) as pool:
            list(pool.map(act, names))

    def _names(self) -> list[str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def _has(self, name: str) -> bool:
        return self._fs.exists(f"{self._root}/{name}/manifest.json")

    def _read(self, name: str) -> str | None:
        try:
            return self._fs.cat_file(f"{self._root}/{name}").decode("utf-8", "replace").strip()
        except FileNotFoundError:
            return None


def _reason(error: Exception) -> str:
    """In one line, also where the error has no text."""
    return " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
