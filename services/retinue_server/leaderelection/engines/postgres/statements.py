"""The SQL of this folder: named statements, with the names of schema and columns put in."""

from __future__ import annotations

import re
from importlib.resources import files

from retinue_server.runtime.postgres import schema_name

_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)
_VERSION = "now.era || '.' || e.version"
_RECORD = (
    f"e.election_id, e.domain, e.epoch, {_VERSION} AS seen, e.candidate_id, e.session_id, e.value, e.lease_ms,"
    " e.release_delay_ms, e.acquire_ms, e.step_down"
)
"""In the order of the fields of engine.Record."""
_DURABLE = (
    "SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on'"
    " ELSE current_setting('synchronous_commit') END, true)"
)
SYSTEMS = "(SELECT system_identifier FROM pg_control_system())", "0"
"""Ways to ask which cluster this is, the best first."""
TIMELINES = (
    "substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)",
    "(SELECT lpad(to_hex(timeline_id), 8, '0') FROM pg_control_checkpoint())",
    "'00000000'",
)
"""Ways to ask which timeline is written now, the best first."""


class Statements:
    """The statements for one schema, by name: `statements["claim"]`; raises ValueError for what is no schema's name."""

    def __init__(self, schema: str) -> None:
        self.schema = schema_name(schema)
        self.find_era_by(SYSTEMS[0], TIMELINES[0])

    def find_era_by(self, system: str, timeline: str) -> None:
        """Chooses how to ask which history of which cluster this is, by what the role may read."""
        self._names = {
            "schema": self.schema,
            "era": f"to_hex({system}) || '-' || {timeline}",
            "domain": "'postgres-' || now.era || '-' || now.id",
            "version": _VERSION,
            "record": _RECORD,
            "durable": _DURABLE,
        }
        _, *parts = _NAME.split(files(__package__).joinpath("statements.sql").read_text())
        self._texts = {name: self.fill(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}

    def __getitem__(self, name: str) -> str:
        return self._texts[name]

    def fill(self, text: str) -> str:
        """Puts the names into a text."""
        lines = [line for line in text.splitlines() if not line.startswith("--")]
        return re.sub(r"\{([a-z_]+)\}", lambda found: self._names[found[1]], "\n".join(lines).strip())
