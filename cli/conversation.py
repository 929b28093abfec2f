"""`ahl chat`: turns of a conversation on one runtime, and the commands between them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import AdapterHubError, Unsupported
from .answering import write
from .render import printable, remark

if TYPE_CHECKING:
    from ..runtime.runtime import Runtime
    from ..runtime.sampling import Sampling

_HELP = """\
/use REF     answer with this adapter from now on
/base        answer with the bare base
/adapters    the adapters in the store
/reset       forget the conversation
/quit        leave (or Ctrl-D)"""


class Conversation:
    """Holds the messages; a switch of adapters keeps them."""

    def __init__(self, runtime: Runtime, max_new_tokens: int, sampling: Sampling, as_json: bool = False) -> None:
        if runtime.base.kind == "encoder":
            raise Unsupported(
                f"{runtime.base.name} is an encoder: it writes no text.", "Use `ahl run` or `ahl predict`."
            )
        self._runtime = runtime
        self._tokens = max_new_tokens
        self._sampling = sampling
        self._as_json = as_json
        self._messages: list[dict[str, str]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/use": self._use,
            "/base": self._use_base,
            "/adapters": self._list,
            "/reset": self._reset,
            "/help": lambda _: remark(_HELP),
        }

    def hold(self) -> None:
        """Read lines and answer them until the end of the input or /quit."""
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  # input() then edits lines and remembers them
            remark(f"{self._runtime.base.name}, {self._runtime.default or 'no adapter'}. /help lists the commands.")
        while True:
            try:
                line = input(self._prompt() if is_terminal else "").strip()
            except (EOFError, KeyboardInterrupt):
                if is_terminal:
                    remark("")
                return
            if line == "/quit":
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """One line: a command, or something to answer. What goes wrong is said, and the conversation goes on."""
        word, _, rest = line.partition(" ")
        try:
            if word in self._commands:
                self._commands[word](rest.strip())
            elif line.startswith("/"):
                remark(f"error: there is no command {printable(word)}; /help lists them")
            else:
                self._answer(line)
        except AdapterHubError as error:
            remark(f"error: {printable(str(error), keep_lines=True)}")

    def _answer(self, line: str) -> None:
        asked = [*self._messages, {"role": "user", "content": line}]
        pieces = self._runtime.stream([*self._system(), *asked], max_new_tokens=self._tokens, sampling=self._sampling)
        said: list[str] = []
        try:
            if self._as_json:
                said += pieces
                print(
                    json.dumps({"adapter": self._runtime.default, "prompt": line, "answer": "".join(said)}), flush=True
                )
            else:
                write(said.append(piece) or piece for piece in pieces)  # type: ignore[func-returns-value]
        except KeyboardInterrupt:
            remark("\n(stopped)")
        self._messages = [*asked, {"role": "assistant", "content": "".join(said)}]

    def _system(self) -> list[dict[str, str]]:
        """The system message that the adapter in use was trained with."""
        ref = self._runtime.default
        task = self._runtime.task(ref) if ref else None
        system = task.config.get("system") if task else None
        return [{"role": "system", "content": str(system)}] if system else []

    def _use(self, ref: str) -> None:
        if not ref:
            remark("error: /use needs a reference, for example /use sql")
            return
        self._runtime.use(ref)
        remark(f"now with {self._runtime.default}")

    def _use_base(self, _: str) -> None:
        self._runtime.use(None)
        remark("now without adapter")

    def _list(self, _: str) -> None:
        entries = [entry for entry in self._runtime.store.list() if not entry.problem]
        for entry in entries:
            remark(
                f"{entry.name}@{entry.version}  {entry.summary.get('type')} for {printable(entry.summary.get('base'))}"
            )
        if not entries:
            remark("the store is empty; `ahl train sql` makes one")

    def _reset(self, _: str) -> None:
        self._messages = []
        remark("forgotten")

    def _prompt(self) -> str:
        return f"{self._runtime.default or 'base'}> "
