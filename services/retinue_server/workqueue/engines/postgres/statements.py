"""The SQL of this folder: named statements, with the names of schema and columns put in."""

from __future__ import annotations

import re
from importlib.resources import files

from retinue_server.runtime.postgres import schema_name

ROW = (
    "seq", "task_id", "queue_id", "state", "priority", "create_ms", "ready_ms", "expire_ms", "attempt_ms", "attempt",
    "lease_expirations", "lease_epoch", "lease_nonce", "lease_ms", "lease_until", "attempt_until", "worker_id",
    "lease_request_id", "outcome", "cancel_requested", "start_ms", "end_ms", "delete_ms", "idempotency_key",
    "parent_task_id",
)  # fmt: skip
"""The columns of a row, in the order of the fields of TaskRow."""

BODY = (
    "input", "task_type", "labels", "retry", "traceparent", "input_blob", "result", "result_blob", "failure",
)  # fmt: skip
"""The columns of a body, in the order of the fields of TaskBody."""

FRESH = (
    "seq", "lease_epoch", "task_id", "priority", "create_ms", "ready_ms", "expire_ms", "attempt_ms", "idempotency_key",
    "parent_task_id", "input", "task_type", "labels", "retry", "traceparent", "input_blob",
)  # fmt: skip
"""What can differ between ready tasks of a queue that were never leased (epoch 0)."""

QUEUES_LOCK, ROOM_LOCK, REQUEST_LOCK, DAYS_LOCK = 0x5E71_0001, 0x5E71_0002, 0x5E71_0003, 0x5E71_0004
"""Advisory locks (their first number): all queues, the room of one, a lease request, the days of history."""

_IN_BODY = {"task_id", "create_ms", "attempt_ms", "idempotency_key", "parent_task_id"}
"""The columns of a row that never change."""
_HEAVY = {"input", "result"}
_ITS_BODY = "LATERAL (SELECT * FROM {schema}.body WHERE body.seq = t.seq AND body.queue_id = t.queue_id OFFSET 0) b"
"""The body of a task that was found, by an index whatever the planner thinks of the tables' sizes: those that were
empty when it last looked are so to it, and all of one is as well read for each row of the other."""
_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


class Statements:
    """The statements for one schema, by name: `statements["ready"]`."""

    def __init__(self, schema: str) -> None:
        self.schema = schema_name(schema)
        now_ms = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
        self._names = {
            "schema": schema,
            "room_lock": str(ROOM_LOCK),
            "now_ms": now_ms,
            "kept": f"(h.drop_day = -1 OR h.delete_ms > {now_ms.replace('clock_timestamp', 'now')})",
            "its_body": _ITS_BODY.format(schema=schema),
            "row": ", ".join(f"{'b' if name in _IN_BODY else 't'}.{name}" for name in ROW),
            "body": ", ".join(f"b.{name}" for name in BODY),
            "light": ", ".join("''::bytea" if name in _HEAVY else f"b.{name}" for name in BODY),
            "fresh": ", ".join(f"{'t' if name in ROW and name not in _IN_BODY else 'b'}.{name}" for name in FRESH),
            "old_row": ", ".join(f"h.{name}" for name in ROW),
            "old_body": ", ".join(f"h.{name}" for name in BODY),
            "old_light": ", ".join("''::bytea" if name in _HEAVY else f"h.{name}" for name in BODY),
        }
        _, *parts = _NAME.split(files(__package__).joinpath("statements.sql").read_text())
        self._texts = {name: self.fill(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}

    def __getitem__(self, name: str) -> str:
        return self._texts[name]

    def fill(self, text: str) -> str:
        """Puts the names into a text; other braces stay as they are."""
        lines = [line for line in text.splitlines() if not line.startswith("--")]
        return re.sub(r"\{([a-z_]+)\}", lambda found: self._names[found[1]], "\n".join(lines).strip())
