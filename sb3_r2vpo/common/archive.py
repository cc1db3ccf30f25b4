"""One file for all that belongs together: written whole or not at all, and checked for damage when it is read."""

import contextlib
import fcntl
import functools
import glob
import hashlib
import io
import json
import os
import secrets
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch as th
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from stable_baselines3.common.save_util import open_path

from sb3_r2vpo.common.serialization import LostError, UntrustedError, decode, encode

#: What SB3 takes to save to and to load from
PathOrFile = str | Path | io.BufferedIOBase

#: Of the archive; a larger one is of a later version of this package
FORMAT = 1

_PACKAGES = ("sb3-r2vpo", "stable-baselines3", "sb3-contrib", "gymnasium", "torch", "numpy", "safetensors")


class CorruptFileError(ValueError):
    """A file is damaged, cut off, or another one than it should be."""


def write_archive(path: PathOrFile, sections: dict[str, Any], suffix: str | None = None) -> None:
    """
    Write values into one file: a zip archive with ``<section>.json`` and ``<section>.safetensors`` for each section, and
    ``format.json``, which has the versions of packages and the SHA-256 checksums of all others.

    :param path: Where to write, or a file that is open for it; see :func:`written_atomically`
    :param sections: What to write, by name: values that :func:`~sb3_r2vpo.common.serialization.encode` takes
    :param suffix: Added to a path that has none
    :raises ValueError: A value can't be written; nothing is.
    :raises OSError: The disk is full, for instance. A path is as before, with what was there.
    """
    written = {name: encode_section(name, value) for name, value in sections.items()}
    with written_atomically(path, suffix) as file, zipfile.ZipFile(file, "w") as archive:
        checksums = {}
        for name, (tree, tensors) in written.items():
            contents = {f"{name}.json": json.dumps(tree, allow_nan=False).encode()}
            if tensors:
                contents[f"{name}.safetensors"] = save_tensors(tensors)
            for entry, content in contents.items():
                checksums[entry] = hashlib.sha256(content).hexdigest()
                # Not the time of now: that before 1980 is an error, and some robots have no clock
                archive.writestr(zipfile.ZipInfo(entry), content)
        about = {"format": FORMAT, "packages": _versions(), "sha256": checksums}
        archive.writestr(zipfile.ZipInfo("format.json"), json.dumps(about, indent=1))


def encode_section(name: str, value: Any) -> tuple[Any, dict[str, th.Tensor]]:
    """:func:`encode` with the section's name in the error."""
    try:
        return encode(value)
    except ValueError as error:
        raise ValueError(f"Nothing was saved, and an older file is as before. In {name!r}: {error}") from error


@functools.cache
def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def read_archive(path: PathOrFile, trust: bool = False) -> dict[str, Any]:
    """
    Read what :func:`write_archive` has written.

    :param path: The file
    :param trust: see :func:`~sb3_r2vpo.common.serialization.decode`
    :return: The values by section
    :raises CorruptFileError: The file is damaged, or another one.
    :raises UntrustedError: It names a class or function that is not on the list.
    """
    return {name: decode_section(path, *section, trust) for name, section in read_sections(path).items()}


def decode_section(path: PathOrFile, tree: Any, tensors: dict[str, th.Tensor], trust: bool) -> Any:
    """:func:`decode` with the file's name in the error."""
    try:
        return decode(tree, tensors, trust)
    except (LostError, UntrustedError) as error:
        raise type(error)(f"{describe(path)}: {error}") from error
    except ValueError as error:
        raise CorruptFileError(f"{describe(path)} can't be read: {error}") from error


def read_sections(path: PathOrFile, suffix: str | None = None) -> dict[str, tuple[Any, dict[str, th.Tensor]]]:
    """
    :param path: The file
    :param suffix: Added to the path where there is no such file without it
    :return: JSON and tensors of each section, not decoded yet
    :raises CorruptFileError: The file is damaged, or another one.
    """
    with opened(path, suffix) as file:
        return sections_of(read_zip(file, describe(path)), describe(path))


def sections_of(entries: dict[str, bytes], where: str) -> dict[str, tuple[Any, dict[str, th.Tensor]]]:
    """
    :param entries: Of an archive, by name; emptied on the way
    :param where: The file, for errors
    :return: JSON and tensors of each section
    :raises CorruptFileError: They are damaged, or those of another file.
    """
    if "format.json" not in entries:
        raise CorruptFileError(f"{where} is a zip archive, but not one of this package: it has no `format.json`.")
    try:
        about = json.loads(entries.pop("format.json"))
        made_by, checksums = about["format"], about["sha256"]
        if made_by > FORMAT:
            raise ValueError(f"it was written by a later version of sb3_r2vpo, {about['packages'].get('sb3-r2vpo')}")
        if {name: hashlib.sha256(content).hexdigest() for name, content in entries.items()} != checksums:
            raise ValueError("its contents do not have the checksums that they were written with")
        trees = {name.removesuffix(".json"): json.loads(entries.pop(name)) for name in checksums if name.endswith(".json")}
        sections = {}
        for name, tree in trees.items():
            tensors = entries.pop(f"{name}.safetensors", None)
            sections[name] = tree, load_tensors(tensors) if tensors is not None else {}
        return sections
    except Exception as error:
        raise _damaged(where, error) from error


def read_zip(file: IO[bytes], where: str) -> dict[str, bytes]:
    """
    :param file: A zip archive
    :param where: Its name, for errors
    :return: Its entries, whose own checksums were verified
    :raises CorruptFileError: It is not one, or damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
            if len(entries) != len(archive.namelist()):
                raise ValueError("it has two entries of one name")
            return entries
    except Exception as error:
        raise _damaged(where, error) from error


def _damaged(where: str, error: Exception) -> CorruptFileError:
    # The first words are those of SB3
    return CorruptFileError(
        f"Error: the file {where} wasn't a zip-file, or is damaged or cut off ({error}). Load an older copy, such as that of "
        "the checkpoint before it."
    )


def describe(path: PathOrFile) -> str:
    """:return: A path for an error, or what stands for that of an open file"""
    return str(path if isinstance(path, str | Path) else getattr(path, "name", "The open file"))


@contextlib.contextmanager
def opened(path: PathOrFile, suffix: str | None = None) -> Iterator[IO[bytes]]:
    """
    :param path: A file to read, or one that is open, which stays so
    :param suffix: Added to the path where there is no such file without it
    :return: The open file
    """
    file = open_path(path, "r", suffix=suffix)
    try:
        yield file
    finally:
        if isinstance(path, str | Path):
            file.close()


@contextlib.contextmanager
def written_atomically(path: PathOrFile, suffix: str | None = None) -> Iterator[IO[bytes]]:
    """
    A file to write that appears at its path complete or not at all: what was there before stays if anything fails, be it that
    the disk is full, the power goes or someone presses Ctrl-C.

    It is written beside its place as ``.<name>.<random>.partial``, put on the disk (fsync), and renamed. Such files that a
    killed process has left behind are removed. Folders are made, and a path that is a folder is changed, as SB3 does.

    :param path: The path; or a file that is open for writing, which has to look after itself
    :param suffix: Added to a path that has none
    :return: The file, open for writing bytes
    :raises OSError: It can't be written.
    """
    if not isinstance(path, str | Path):
        yield open_path(path, "w")
        return
    target = _prepare(Path(path), suffix)
    if target.exists() and not target.is_file():
        # A device or a pipe
        with target.open("wb") as file:
            yield file
        return
    _remove_abandoned(target)
    partial = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                error.errno, f"{path} was not saved, and an older file there is as before: {error.strerror or error}"
            ) from error
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _prepare(path: Path, suffix: str | None) -> Path:
    """The path that SB3 would write to, with its folder."""
    if path.suffix == "" and suffix:
        path = path.with_name(f"{path.name}.{suffix}")
    if path.is_dir():
        warnings.warn(f"Path '{path}' is a folder. Will save instead to {path}_2", stacklevel=5)
        path = path.with_name(f"{path.name}_2")
    if not path.parent.exists():
        warnings.warn(f"Path '{path.parent}' does not exist. Will create it.", stacklevel=5)
        path.parent.mkdir(exist_ok=True, parents=True)
    # A link goes on to lead to the file, and what must not be written is not replaced either
    path = path.resolve()
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} must not be written.")
    return path


def _remove_abandoned(target: Path) -> None:
    """Files of processes that were killed: nobody holds their lock any more."""
    for partial in target.parent.glob(f".{glob.escape(target.name[:200])}.????????.partial"):
        with contextlib.suppress(OSError), partial.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()
