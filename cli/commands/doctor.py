"""`ahl doctor`."""

from __future__ import annotations

from dataclasses import asdict

from ..app import command, new_app
from ..diagnosis import diagnose
from ..guard import Failure
from ..opening import open_store, silence
from ..options import JsonOption, StoreOption
from ..render import counted, emit, printable, say

app = new_app()
_MARKS = {"ok": " ", "warning": "!", "trouble": "x"}


@command(app, "ahl doctor", "ahl doctor --json", name="doctor")
def run(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Say what was chosen on this machine and why, and what is wrong.

    Exits with 1 when something will not work; `!` marks what is only worth knowing.
    """
    silence()
    facts = diagnose(open_store(store))
    wrong = [fact for fact in facts if fact.state == "trouble"]
    if as_json:
        emit({"sound": not wrong, "facts": [asdict(fact) for fact in facts]})
    else:
        size = max(len(fact.name) for fact in facts)
        for fact in facts:
            reason = f"  ({fact.reason})" if fact.reason else ""
            say(printable(f"{_MARKS[fact.state]} {fact.name:<{size}}  {fact.value}{reason}"))
        say("", f"{counted(len(wrong), 'troubles')} found." if wrong else "Everything works.")
    if wrong:
        raise Failure("trouble found")
