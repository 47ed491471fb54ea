"""The echo pattern as a wiring module, for tests that run the command."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from support import echo

if TYPE_CHECKING:
    from retinue_server.runtime.config import Settings
    from retinue_server.runtime.dispatch import Pattern


class SETTINGS(msgspec.Struct, frozen=True, kw_only=True):
    """One setting, so that sections can be tested."""

    greeting: str = "hello"


async def wire(_: Settings, section: SETTINGS) -> Pattern:
    return echo.pattern(echo.EchoServicer(), notices=lambda: [f"greets with {section.greeting}", "durability: none"])
