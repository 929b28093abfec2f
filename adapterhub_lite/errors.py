"""One exception tree: every error of the package says what happened and what to do next.

Takes: nothing. Gives: exceptions that are picklable and also inherit the standard error they stand for.
Never: prints, logs or exits; the command line renders them and uses `exit_code`.
"""

from __future__ import annotations

from dataclasses import dataclass


class AdapterHubError(Exception):
    """Root of the tree. `message` says what is wrong, `hint` what to do next; `str()` joins them."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class InvalidName(AdapterHubError, ValueError):
    """Text that is not an adapter name, alias, version, digest or reference."""


class NotFound(AdapterHubError, LookupError):
    """A reference, base, recipe or file that does not exist."""

    __str__ = AdapterHubError.__str__  # LookupError subclasses such as KeyError would quote the text


class FormatError(AdapterHubError, ValueError):
    """A file whose bytes do not follow its format, or go beyond a declared limit."""


class UnsafeFile(FormatError):
    """A file that could run code or escape its folder (pickle, link, path in a name)."""


class DataError(AdapterHubError, ValueError):
    """Training or evaluation data that cannot be used; the message names file and line."""


class AdapterMismatch(AdapterHubError, ValueError):
    """Tensors that do not fit a base exactly: missing, unexpected, misshapen or not finite."""


class BaseMismatch(AdapterHubError, ValueError):
    """An adapter that was made for another base."""


class NoEffect(AdapterHubError, ValueError):
    """An adapter that moves no logit of its base."""


class EffectChanged(AdapterHubError, ValueError):
    """An adapter that does something else to its base than was measured when it was published."""


class Unsupported(AdapterHubError, ValueError):
    """A valid request for something this package or this base cannot do."""


class BaseUnavailable(AdapterHubError, OSError):
    """No source of a base answered; the message lists what was tried."""

    __str__ = AdapterHubError.__str__


class StoreError(AdapterHubError, OSError):
    """The store could not be read or written; it is left as it was."""

    __str__ = AdapterHubError.__str__


class StoreFull(StoreError):
    """No space left: says how many bytes were needed."""


class StoreCorrupt(StoreError):
    """Content that does not match its digest; never served."""


class StoreNewer(StoreError):
    """A store written by a newer version of this package."""


class TrainingFailed(AdapterHubError, RuntimeError):
    """Training stopped and nothing was published (loss or gradient not finite, no memory)."""


class TrainingInterrupted(AdapterHubError, KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a training run after the step that ran; nothing was published.

    `exit_code` is what a shell expects of a process that the signal ended: 130 or 143.
    """

    def __init__(self, message: str, hint: str = "", exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type, tuple[str, str, int]]:
        return (type(self), (self.message, self.hint, self.exit_code))

    @classmethod
    def by(cls, number: int, step: int, kept: bool) -> TrainingInterrupted:
        """`number` of the signal, steps that are done, and whether a checkpoint of them is kept."""
        if kept:
            return cls(f"Stopped after step {step}, which is kept.", "Go on with --resume.", 128 + number)
        return cls(f"Stopped after step {step}; nothing is kept.", "", 128 + number)


class MergeFailed(AdapterHubError, RuntimeError):
    """A merge whose result did not pass verification; no output was left."""


class CapacityError(AdapterHubError, RuntimeError):
    """A declared limit of the runtime is reached; the message gives limit and need."""


class BaseDiffers(UserWarning):
    """An adapter is served on a base that is not exactly the one it was made on, as in another precision."""


class SlowAdapter(UserWarning):
    """An adapter is served more slowly than others, since there is no form of ours for it."""


@dataclass(frozen=True)
class Problem:
    """One wrong field of a recipe: where (`path`, 1-based `line`, 0 if unknown), what, and what to write instead."""

    path: str
    message: str
    hint: str = ""
    line: int = 0

    def __str__(self) -> str:
        at = f" (line {self.line})" if self.line else ""
        return f"{self.path}{at}: {self.message} {self.hint}".rstrip()


class RecipeError(AdapterHubError, ValueError):
    """All problems of a recipe at once."""

    def __init__(self, source: str, problems: tuple[Problem, ...] | list[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n  ".join([head, *map(str, self.problems)]))

    def __reduce__(self) -> tuple[type, tuple[str, tuple[Problem, ...]]]:
        return (type(self), (self.source, self.problems))
