"""Repositories of the Hugging Face Hub: what one holds at a commit, its files into a folder, and what went wrong.

Everything goes through the session of `huggingface_hub`, with its endpoint and login; nothing through its cache.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..bases.hub import first_line, offline_switch, quiet, soon
from ..errors import AdapterHubError, InvalidName, NotFound, StoreFull

SCHEME = "hub:"
_PATIENCE = 20.0  # seconds until a silent network counts as none
_READING = 30.0  # seconds between two pieces of a file
_ATTEMPTS = 3
_PIECE = 1 << 20
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,248}[A-Za-z0-9_-])?", re.ASCII)
_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[\w.-]+))?(?:[/?#].*)?$",
    re.ASCII,
)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_AGAIN = "Try again; if it stays so, the repository is damaged."
_LOGIN = "For a private one, log in with: hf auth login"


class HubError(AdapterHubError, OSError):
    """The Hub could not be reached, refused, or gave something else than it announced."""

    __str__ = AdapterHubError.__str__


@dataclass(frozen=True)
class Remote:
    """A file as the Hub lists it: size in bytes; sha256 (LFS) or git's sha1 of the blob, where it tells."""

    name: str
    size: int | None
    sha256: str | None
    blob: str | None

    def check(self, data: bytes) -> None:
        """Raise HubError where `data` is not what is listed."""
        if self.size is not None and len(data) != self.size:
            raise HubError(f"{self.name} has {len(data)} bytes; the Hub lists {self.size}.", _AGAIN)
        if self.sha256 is not None:
            same = hashlib.sha256(data).hexdigest() == self.sha256
        else:
            same = self.blob is None or _git_blob(data) == self.blob
        if not same:
            raise HubError(f"{self.name} does not have the digest that the Hub lists for it.", _AGAIN)


@dataclass(frozen=True)
class Listing:
    """A repository at one commit. `private` is None where the Hub does not say."""

    repo: str
    commit: str
    private: bool | None
    files: Mapping[str, Remote]


def check_repo(repo: str) -> str:
    """Return `repo` if it is `owner/name` as the Hub writes it. Raises InvalidName."""
    parts = repo.split("/") if isinstance(repo, str) and len(repo) <= 96 else []
    ok = len(parts) == 2 and all(map(_PART.fullmatch, parts))
    if not ok or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise InvalidName(f"{ascii(repo)[:120]} is not a repository of the Hub.", "Write owner/name.")
    return repo


def check_revision(revision: str) -> str:
    """Return `revision` if it can be a branch, a tag or a commit. Raises InvalidName."""
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or revision.endswith(".lock"):
        raise InvalidName(f"{ascii(revision)[:120]} is not a revision.", "Write a branch, a tag or a commit.")
    return revision


def parse_source(text: str) -> tuple[str, str | None]:
    """`hub:owner/name[@revision]` as repository and revision. Raises InvalidName."""
    if not text.startswith(SCHEME):
        raise InvalidName(f"{ascii(text)[:120]} is not a repository of the Hub.", "Write hub:owner/name.")
    repo, at, revision = text.removeprefix(SCHEME).partition("@")
    return check_repo(repo), check_revision(revision) if at else None


def refuse_address(text: str) -> None:
    """Raise InvalidName for a web address, with the reference to write instead where it is a repository of the Hub."""
    page = _PAGE.match(text)
    if page is not None:
        repo = page["repo"].removesuffix(".git")
        name = f"{SCHEME}{repo}@{page['revision']}" if page["revision"] else f"{SCHEME}{repo}"
        raise InvalidName(f"{ascii(text)[:120]} is a web page.", f"Write: ahl import {name}")
    if "://" in text:
        raise InvalidName(f"{ascii(text)[:120]} is an address.", "Download it, and import the folder or archive.")


def parse_target(text: str) -> str:
    """`hub:owner/name` as the repository to write to. Raises InvalidName."""
    repo, revision = parse_source(text)
    if revision is not None:
        raise InvalidName(f"{ascii(text)[:120]} names a revision.", f"A push goes to main: write {SCHEME}{repo}.")
    return repo


def refuse_offline() -> None:
    """Raise HubError if the environment forbids the Hub."""
    off = offline_switch()
    if off:
        raise HubError(f"The Hub is switched off by {off}.", f"Unset {off} to reach it.")


def look(repo: str, revision: str | None = None) -> Listing:
    """What a repository holds now at `revision` (None: its main branch), bound to the commit. Raises as `failures`."""
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=_PATIENCE)

    with failures(repo, revision):
        info = soon(ask, _PATIENCE)
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise HubError(f"The Hub names no commit for {repo}.", "Check HF_ENDPOINT, if it is set.")
    files = {entry.rfilename: _remote(entry) for entry in info.siblings or ()}
    return Listing(repo, info.sha, info.private, files)


def download(listing: Listing, name: str, folder: Path, limit: int, on_bytes: Callable[[int], None]) -> Path:
    """One file of a listing into `folder`, checked against the listing; `on_bytes` hears how many are there.

    Raises:
        HubError, NotFound: as `failures`, and for bytes that are not those listed.
    """
    remote, target = listing.files[name], folder / name
    if remote.size is not None and remote.size > limit:
        raise HubError(f"{name} of {listing.repo} has {remote.size} bytes; the limit is {limit}.")
    with failures(listing.repo, listing.commit):
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                _receive(listing, remote, target, limit, on_bytes)
                return target
            except OSError:  # an answer of the Hub, a full disk: the same again
                raise
            except Exception:  # a connection that broke; whose type depends on the client's version
                if attempt == _ATTEMPTS:
                    raise
    return target


@contextmanager
def failures(repo: str, revision: str | None = None) -> Iterator[None]:
    """Any failure of the Hub's client (it raises several unrelated trees) as an error that says what to do next.

    Without its cause: that may quote the request, and with it the token.

    Raises:
        NotFound: no such repository or revision, as far as this login can see.
        StoreFull: no space for what is downloaded.
        HubError: everything else.
    """
    try:
        with quiet():
            yield
    except AdapterHubError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # a file of this machine, such as the login's
            raise
        raise _failure(error, repo, revision) from None


def _failure(error: Exception, repo: str, revision: str | None) -> AdapterHubError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return HubError(f"Access to {repo} must be granted.", "Ask for it on the repository's page and log in.")
    if isinstance(error, RevisionNotFoundError):
        return NotFound(f"{repo} has no revision {revision}.", "Leave it out for the newest state of main.")
    if isinstance(error, RepositoryNotFoundError):
        return NotFound(f"There is no repository {repo} on the Hub, or it is private.", _LOGIN)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return _answered(int(status), error, repo)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return StoreFull("No space left for the download.", "Free some, or set TMPDIR to a folder on another disk.")
    if isinstance(error, UnicodeEncodeError):  # the one header that is not made here
        return HubError("The login holds characters that cannot be sent.", "Log in anew with: hf auth login")
    message = f"The Hub could not be reached: {type(error).__name__}: {first_line(error)}"
    return HubError(f"{message.rstrip('.')}.", "Check the network (and HF_ENDPOINT, if it is set), and try again.")


def _answered(status: int, error: Exception, repo: str) -> AdapterHubError:
    hints = {
        401: "Log in (anew) with: hf auth login",
        403: "Log in with a token that may do this: hf auth login",
        412: "Somebody else wrote to it just now: try again.",
        429: "It asks for patience: try again in some minutes.",
    }
    told = getattr(error, "server_message", None)
    said = f" ({first_line(ValueError(told))})" if told else ""
    again = "Try again later." if status >= 500 else "See what the repository's page says."
    return HubError(f"The Hub answered {status} for {repo}{said}.", hints.get(status, again))


def _remote(entry: Any) -> Remote:
    lfs = entry.lfs
    if lfs is None:
        return Remote(entry.rfilename, entry.size, None, entry.blob_id)
    return Remote(entry.rfilename, lfs.size, lfs.sha256, None)


def _receive(listing: Listing, remote: Remote, target: Path, limit: int, on_bytes: Callable[[int], None]) -> None:
    """Stream one file to `target`, never more bytes than are listed."""
    from huggingface_hub import hf_hub_url

    client: Any = import_module("huggingface_hub.utils")  # its names are documented, and not declared as exported
    url = hf_hub_url(listing.repo, remote.name, revision=listing.commit)
    headers = {**client.build_hf_headers(library_name="adapterhub-lite"), "accept-encoding": "identity"}
    size, most = 0, limit if remote.size is None else remote.size
    with (
        target.open("wb") as file,
        client.get_session().stream("GET", url, headers=headers, timeout=_READING) as answer,
    ):
        client.hf_raise_for_status(answer)
        for piece in answer.iter_bytes(_PIECE):
            size += len(piece)
            if size > most:
                raise HubError(f"{remote.name} came with more than the {most} bytes it may have.", _AGAIN)
            file.write(piece)
            on_bytes(size)
    remote.check(target.read_bytes())


def _git_blob(data: bytes) -> str:
    """The name that git gives to a file: sha1 of `blob SIZE`, a zero byte, and the bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
