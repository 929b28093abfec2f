"""A base from the local Hub cache, or from the Hub itself.

Takes: a Hub id. Gives: the snapshot folder and its commit. Never: downloads code or pickle, or waits long for a dead
network.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from ..errors import AdapterHubError, BaseUnavailable, UnsafeFile
from ..events import Listener, Progress
from .folder import INDEX, PICKLES, WEIGHTS, check_folder

_T = TypeVar("_T")
_PATIENCE = 5.0  # seconds until a silent network counts as none
_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "AHL_OFFLINE")
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_KEPT = (".json", ".txt", ".model", ".jinja", ".tiktoken")
_SECRETS = re.compile(r"Bearer .*|\bhf_\w+|(?<=://)[^\s/@]*@|\?\S+")  # the last: signatures of addresses
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", ".model", ".tiktoken")


def is_on(switch: str) -> bool:
    """Whether an environment switch is set to something that means yes."""
    return os.environ.get(switch, "").strip().lower() in {"1", "true", "yes", "on"}


def offline_switch() -> str | None:
    """The environment switch that forbids the Hub, if one is on."""
    return next((switch for switch in _SWITCHES if is_on(switch)), None)


def from_cache(hub_id: str) -> tuple[Path, str]:
    """The complete snapshot of `hub_id` that some tool has left in the local Hub cache, and its commit."""
    from huggingface_hub import try_to_load_from_cache

    # Not snapshot_download(local_files_only=True): that calls a snapshot which transformers itself fetched
    # incomplete, because it lacks files nobody needs.
    with _reasons():
        config = try_to_load_from_cache(hub_id, "config.json")
    if not isinstance(config, str):
        raise BaseUnavailable("not there")
    folder = Path(config).parent
    check_folder(folder)
    if not any(path.name.endswith(_TOKENIZERS) for path in folder.iterdir()):
        raise BaseUnavailable("there, but without its tokenizer")
    return folder, folder.name


def from_hub(hub_id: str, on_event: Listener) -> tuple[Path, str]:
    """Download the safetensors snapshot of `hub_id`; gives the folder and the commit it was resolved to."""
    off = offline_switch()
    if off:
        raise BaseUnavailable(f"switched off by {off}")
    from huggingface_hub import HfApi

    with quiet(), _reasons():
        info = soon(lambda: HfApi().model_info(hub_id, timeout=_PATIENCE))
        wanted = wanted_files(entry.rfilename for entry in info.siblings or ())
        folder = _snapshot(hub_id, wanted, on_event)
    check_folder(folder)
    return folder, folder.name


def wanted_files(names: Iterable[str]) -> list[str]:
    """The files of a repository that make a base: weights in safetensors, config and tokenizer.

    Raises:
        UnsafeFile: the weights exist only as pickle.
    """
    top = [name for name in names if "/" not in name and name != "adapter_config.json"]
    weights = [name for name in top if name == WEIGHTS]
    if not weights and INDEX in top:
        weights = [name for name in top if name.startswith("model-") and name.endswith(".safetensors")]
    if not weights:
        pickles = any(name.endswith(PICKLES) for name in top)
        raise UnsafeFile("its weights are only in pickle files" if pickles else f"it holds no {WEIGHTS}")
    return weights + [name for name in top if name.endswith(_KEPT)]


def _snapshot(hub_id: str, wanted: list[str], on_event: Listener) -> Path:
    from huggingface_hub import snapshot_download

    title, patterns = f"download {hub_id}", [escape(name) for name in wanted]
    folder = Path(snapshot_download(hub_id, allow_patterns=patterns, tqdm_class=_bar(title, on_event)))
    size = sum((folder / name).stat().st_size for name in wanted)
    on_event(Progress(title, size, size, "B"))
    return folder


def _bar(title: str, on_event: Listener) -> type[Any]:
    """A progress bar class that reports bytes as events and draws nothing."""
    tqdm: Any = import_module("tqdm").tqdm

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        tqdm.__init__(self, *args, **{**kwargs, "file": _Nowhere(), "mininterval": 0.2})

    def display(self: Any, *_: Any, **__: Any) -> None:
        if self.unit == "B" and self.total and "Reconstructing" in str(self.desc):
            on_event(Progress(title, int(self.n), int(self.total), "B"))

    return type("Bar", (tqdm,), {"__init__": init, "display": display})


class _Nowhere:
    def write(self, text: str) -> None: ...
    def flush(self) -> None: ...


def soon(ask: Callable[[], _T], patience: float | None = None) -> _T:
    """The result of `ask` if it comes within `patience` seconds (None: 5).

    In a thread of its own, because neither name resolution nor a list of dead addresses heeds a timeout.

    Raises:
        TimeoutError: it did not; else whatever `ask` raised.
    """
    patience = _PATIENCE if patience is None else patience
    done: list[_T] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            done.append(ask())
        except Exception as error:  # handed to the caller's thread below
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(patience)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no answer within {patience:g} seconds")
    return done[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the client's advice on tokens and caches."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _reasons() -> Iterator[None]:
    """Any failure of the Hub's client (it raises several unrelated trees) as `BaseUnavailable`: try the next source."""
    try:
        yield
    except AdapterHubError:
        raise
    except Exception as error:
        raise BaseUnavailable(_reason(error)) from error


def _reason(error: BaseException) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "access must be granted there first (then: hf auth login)"
    if isinstance(error, RepositoryNotFoundError):
        return "no such model, or it is private (then: hf auth login)"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without any token, password or signature that is quoted in it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0]
    for secret in filter(None, (os.environ.get(name, "").strip() for name in _TOKENS)):
        line = line.replace(secret, "***")
    return _SECRETS.sub("***", line)[:200]
