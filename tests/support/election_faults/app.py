"""An app that obeys the rules and acts as long as it may: a candidate that writes to the register while it leads.

python -m support.election_faults.app --name NAME --history DIRECTORY --register PATH ...

It leads again and again. SIGUSR1 makes it resign. Its margin is 0, and between looking whether it leads and writing it
thinks for a moment: what is stopped there and continued writes late.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from unittest.mock import patch

from retinue.client.deadline import Deadline
from retinue.client.election import Election, ElectionEvent, Term
from support.election_faults.clocks import true_boot_ns
from support.election_faults.history import Belief, Recorder
from support.election_faults.register import Ask, Client

_THINKS_S = 0.01
_LETS_OTHERS_S = 0.3
_S = 1_000_000_000
_MOMENT_NS, _TRIES = 200_000, 20


class App:
    """One candidate."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags = flags
        self._recorder = Recorder(flags.history / f"{flags.name}.jsonl")
        self._register = Client(flags.register)
        self._resign = threading.Event()

    def _now(self) -> int:
        return true_boot_ns(self._flags.offset)

    async def run(self) -> None:
        """Until it is killed."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._resign.set)
        flags = self._flags
        async with Election(
            flags.election,
            candidate_id=flags.name,
            lease=flags.lease,
            app_lease=flags.app_lease,
            margin=0,
            proof_dir=None if flags.proof else False,
            listener=self._hear,
        ) as election:
            while True:
                await election.lead(self._work)
                await asyncio.sleep(_LETS_OTHERS_S)

    def _hear(self, event: ElectionEvent) -> None:
        if event.kind == "elected" and (term := event.term) is not None:
            self._note(term, "elected")
            term.on_renewed = lambda: self._note_renewal(term)
        print(self._now() // 1_000_000, event.kind, event.reason, flush=True)  # noqa: T201 - its log

    def _note_renewal(self, term: Term) -> None:
        if term.is_leader():  # what came too late renewed nothing
            self._note(term, "renewed")

    def _note(self, term: Term, kind: str) -> None:
        now, until = self._deadline(term)
        self._recorder.note(Belief(now, self._flags.name, kind, term.token.domain, term.token.value, until))  # type: ignore[arg-type] # one of the kinds

    def _deadline(self, term: Term) -> tuple[int, int]:
        """Now, and the deadline on the true clock: both clocks must be read within a moment, or it would seem early."""
        for _ in range(_TRIES):
            before, left, now = self._now(), term.remaining(), self._now()
            if now - before < _MOMENT_NS:
                break
        return before, now + int(left / self._flags.rate * _S)

    def _work(self, term: Term) -> None:
        self._resign.clear()
        try:
            while not self._resign.is_set():
                decided = self._now()
                term.check()
                time.sleep(_THINKS_S)  # libfaketime loses the waits of events
                self._register.write(Ask(self._flags.name, term.token.domain, term.token.value, decided))
        finally:
            self._note(term, "done")


def count_from_receipt() -> None:
    """A rule that is broken: validity counts from when the answer came."""

    def grant(deadline: Deadline, _: int, seconds: float) -> None:
        deadline.at = deadline.now() + seconds

    patch.object(Deadline, "grant", grant).start()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--election", required=True)
    parser.add_argument("--history", type=Path, required=True)
    parser.add_argument("--register", type=Path, required=True)
    parser.add_argument("--lease", type=float, required=True)
    parser.add_argument("--app-lease", type=float, required=True)
    parser.add_argument("--proof", action="store_true")
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--offset", type=int, default=0)
    if os.environ.get("DEFECT") == "count_from_receipt":
        count_from_receipt()
    asyncio.run(App(parser.parse_args()).run())


if __name__ == "__main__":
    main()
