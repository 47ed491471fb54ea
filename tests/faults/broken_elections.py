"""The server with one rule of elections broken, named in DEFECT: what the checker of leadership must catch.

The rules are broken from here, so that the product has no switch for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from unittest.mock import patch

from retinue_server.__main__ import main
from retinue_server.leaderelection.core.contest import Lead
from retinue_server.leaderelection.core.session import Session
from retinue_server.leaderelection.engine import Record

_FOR_EVER_MS = 3_600_000


def release_when_the_stream_ends() -> None:
    """The end of a stream is taken for a proof of death."""
    patch.object(Session, "releases_on_disconnect", property(lambda _: True)).start()


def forget_the_engine_s_lease() -> None:
    """The app's lease is extended whether or not the engine's could be."""
    renewed = Lead.renewed

    def for_ever(lead: Lead, record: Record, stamp_ms: int) -> None:
        renewed(lead, record, stamp_ms)
        lead.valid_until_ms += _FOR_EVER_MS

    patch.object(Lead, "renewed", for_ever).start()


DEFECTS: dict[str, Callable[[], None]] = {
    one.__name__: one for one in (release_when_the_stream_ends, forget_the_engine_s_lease)
}

if __name__ == "__main__":
    DEFECTS[os.environ["DEFECT"]]()
    sys.exit(main())
