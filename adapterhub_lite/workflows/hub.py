"""Adapters from the Hugging Face Hub, pinned to a commit, and to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..bases.fetch import on_disk
from ..errors import NotFound, StoreCorrupt, UnsafeFile, Unsupported
from ..events import Listener, Note, Progress, Stage, ignore
from ..formats.files import read_regular
from ..formats.peft_config import parse_adapter_config
from ..names import Ref, check_name
from ..store import FileFact, Store
from ..store.incoming import LIMITS
from ..store.layout import CARD, CONFIG, MANIFEST, WEIGHTS
from .hub_client import (
    HubError,
    Listing,
    check_repo,
    check_revision,
    download,
    failures,
    look,
    parse_source,
    parse_target,
    refuse_address,
    refuse_offline,
)
from .model_card import README, local_paths, model_card, without_local_paths
from .receive import receive

__all__ = ["HubError", "Pushed", "commit_of", "parse_source", "parse_target", "pull", "push", "refuse_address"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BARE = {README, ".gitattributes"}  # what the Hub itself puts into a new repository


@dataclass(frozen=True)
class Pushed:
    """Where a version is on the Hub: the repository, the commit (40 hexadecimal digits) and its page.

    `digest` is what an import of it gets: the version's own, unless paths were left out.
    """

    repo: str
    commit: str
    url: str
    digest: str


def commit_of(repo: str, revision: str | None = None) -> str:
    """The commit (40 hexadecimal digits) that a branch or tag of a repository names now. Raises as `pull`."""
    refuse_offline()
    return look(check_repo(repo), check_revision(revision) if revision is not None else None).commit


def pull(
    repo: str,
    name: str,
    *,
    revision: str | None = None,
    store: Store | None = None,
    base: str | None = None,
    base_card: dict[str, Any] | None = None,
    on_event: Listener = ignore,
) -> Ref:
    """Store the adapter of a Hub repository as a new version of `name`.

    The revision is bound to its commit first, so a branch that moves meanwhile changes nothing. Only PEFT's two files,
    and the card and manifest that `push` writes, are downloaded, into a folder that is gone afterwards.

    Args:
        repo: `owner/name`.
        revision: a branch, tag or commit; None is the main branch.
        base: the base that it is for, as in `receive`.
        base_card: as in `Store.import_`.

    Raises:
        HubError: not reachable, refused, or other bytes than the Hub lists.
        NotFound: no such repository or revision, or no adapter in it.
        UnsafeFile: the weights exist only as pickle.
        FormatError, Unsupported, AdapterMismatch, NoEffect, StoreError: as `receive`.
    """
    check_name(name)
    check_repo(repo)
    if revision is not None:
        check_revision(revision)
    if base is not None:
        on_disk(base)  # a name that is none is told before the network is asked
    store = store if store is not None else Store()
    refuse_offline()
    listing = look(repo, revision)
    on_event(Note(f"{repo} is at commit {listing.commit}"))
    with TemporaryDirectory(prefix="ahl-") as scratch:
        folder = Path(scratch) / "adapter"
        folder.mkdir()
        _fetch(listing, folder, on_event)
        source = {"kind": "hub", "repo": repo, "commit": listing.commit}
        return receive(folder, name, store=store, base=base, base_card=base_card, source=source, on_event=on_event)


def push(
    ref: str | Ref,
    repo: str,
    *,
    store: Store | None = None,
    private: bool = True,
    without_paths: bool = False,
    message: str | None = None,
    on_event: Listener = ignore,
) -> Pushed:
    """Upload a version with a model card, in one commit on the main branch; the repository is made if need be.

    The files are the stored ones, byte for byte, so that an import gives a version of the same digest.

    Args:
        private: for the repository, if it is made. One that is public already is then refused.
        without_paths: upload a copy in which the paths of this machine are cut to their last part. Its digest differs.
        message: of the commit; None names the version and its digest.

    Raises:
        StoreCorrupt: the version is damaged.
        Unsupported: card or configuration name paths of this machine, and the repository is to be public.
        HubError, NotFound: as `pull`.
    """
    check_repo(repo)
    store = store if store is not None else Store()
    found = store.resolve(ref)
    files, digest = _stored(store, found)
    if without_paths:
        files, digest = without_local_paths(files)
    _settle_paths(files, repo, private, on_event)
    refuse_offline()
    version = f"{found.name}@{found.version}"
    files[README] = model_card(store.card(found), store.spec(found), version, digest, repo).encode()
    on_event(Stage(f"pushing {version} to {repo}"))
    _prepare(repo, private, on_event)
    return _commit(repo, files, message or f"{version} ({digest[:12]})", digest)


def _fetch(listing: Listing, folder: Path, on_event: Listener) -> None:
    """The files of an adapter into `folder`, each checked."""
    wanted = _wanted(listing, folder)
    total, before = sum(listing.files[file].size or 0 for file in wanted), 0
    for file, limit in wanted.items():

        def told(done: int, before: int = before) -> None:
            on_event(Progress(f"download {listing.repo}", before + done, total, "B"))

        before += download(listing, file, folder, limit, told).stat().st_size


def _wanted(listing: Listing, folder: Path) -> Mapping[str, int]:
    """The files to download with their limits in bytes; raises for a repository without an adapter."""
    files = listing.files
    if CONFIG not in files:
        inside = sorted(file.removesuffix(f"/{CONFIG}") for file in files if file.endswith(f"/{CONFIG}"))
        hint = f"Only the top folder is read; it holds some in {', '.join(inside[:3])}." if inside else ""
        raise NotFound(f"{listing.repo} holds no {CONFIG}: it is no PEFT adapter.", hint)
    if WEIGHTS not in files:
        path = download(listing, CONFIG, folder, LIMITS[CONFIG], lambda done: None)
        parse_adapter_config(path.read_bytes())  # an adapter of another library is told so first
        if any(file.endswith(_PICKLES) for file in files):
            hint = f"Where you trust it, load it with peft and call save_pretrained: that writes {WEIGHTS}."
            raise UnsafeFile(f"The weights of {listing.repo} are a pickle; pickles can run code.", hint)
        raise NotFound(f"{listing.repo} holds no {WEIGHTS}.", "Ask its owner to upload the weights as safetensors.")
    # A card or manifest that could not be ours is somebody else's file of that name, and no reason to refuse.
    own = [file for file in (CARD, MANIFEST) if file in files and (files[file].size or 0) <= LIMITS[file]]
    return {file: LIMITS[file] for file in (CONFIG, WEIGHTS, *(own if len(own) == 2 else ()))}


def _stored(store: Store, ref: Ref) -> tuple[dict[str, bytes], str]:
    """The files of a version as its maker's store wrote them, each checked, and its digest."""
    folder, manifest = store.verified_folder(ref), store.manifest(ref).original
    files = {file: read_regular(folder / file, fact.size) for file, fact in manifest.files.items()}
    if {file: FileFact.of(data) for file, data in files.items()} != dict(manifest.files):
        raise StoreCorrupt(f"{ref} changed while it was read.", "Find what is damaged with: ahl verify")
    return {**files, MANIFEST: manifest.to_bytes()}, manifest.digest


def _settle_paths(files: Mapping[str, bytes], repo: str, private: bool, on_event: Listener) -> None:
    found = local_paths(files)
    if not found:
        return
    shown = ", ".join(found[:3]) + (" and more" if len(found) > 3 else "")
    if private:
        text = f"The card names paths of this machine ({shown}); whoever can read {repo} sees them."
        on_event(Note(f"{text} --without-paths cuts each to its last part.", "warning"))
        return
    raise Unsupported(
        f"The card names paths of this machine ({shown}), and {repo} is to be public.",
        "Push without them (--without-paths): each is cut to its last part, and the digest there differs. Or push"
        " privately.",
    )


def _prepare(repo: str, private: bool, on_event: Listener) -> None:
    """Make the repository, or see that the one that is there may be written to."""
    from huggingface_hub import HfApi

    try:
        listing = look(repo)
    except NotFound:
        with failures(repo):
            HfApi().create_repo(repo, private=private)
        return
    if private and listing.private is not True:
        raise HubError(f"{repo} is public.", "Name another one, or say that it may be public (--public).")
    if not private and listing.private:
        on_event(Note(f"{repo} stays private; its settings on the Hub can change that."))
    others = sorted(set(listing.files) - _BARE)
    if others and CONFIG not in others:
        raise HubError(f"{repo} holds something else ({', '.join(others[:3])}).", "Name a repository of its own.")


def _commit(repo: str, files: Mapping[str, bytes], message: str, digest: str) -> Pushed:
    """Upload in one commit, and see that the Hub has what was sent."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with failures(repo):
        operations = [CommitOperationAdd(file, data) for file, data in files.items()]
        commit = api.create_commit(repo, operations, commit_message=message).oid
    listing = look(repo, commit)
    for file, data in files.items():
        if file not in listing.files:
            raise HubError(f"{repo} did not take {file}.", "See whether its .gitignore names it.")
        listing.files[file].check(data)
    return Pushed(repo, listing.commit, f"{api.endpoint}/{repo}/tree/{listing.commit}", digest)
