"""A Grafana dashboard made of the names that the adapter exports: a panel for each.

.venv/bin/python deploy/adapter/dashboard.py > deploy/adapter/dashboard.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

from retinue_server.adapter import metrics
from retinue_server.adapter.core import exposition
from retinue_server.adapter.core.points import Histogram, Signal
from retinue_server.adapter.core.spec import Kind, Spec
from retinue_server.adapter.core.target import Target

SOURCE = {"type": "prometheus", "uid": "${source}"}
OF_TARGETS = '{service=~"$service",target=~"$target"}'
RATE = "[$__rate_interval]"
COLUMNS, WIDTH, HEIGHT = 3, 8, 7
UNITS = {"seconds": "s", "ratio": "percentunit"}


class Exported(NamedTuple):
    """What there is to draw."""

    name: str
    type: str
    help: str
    labels: tuple[str, ...]


def exported() -> tuple[list[Exported], list[Exported]]:
    """The golden signals, and what the adapter counts, as one target that has all of it shows them."""
    target = Target(Spec("one", Kind.STATSD))
    values = (1.0, 1.0, Histogram((), 0.0, 0.0), 0.5)
    signals = [Signal(value, "", "") for value in values]
    target.succeeded([], signals, now_ms=1, took_ms=1, rejected={"reason": 1}, examples={}, limited=False)
    source = SimpleNamespace(received=0, dropped=0)
    targets: Any = SimpleNamespace(all=lambda: [target], source=lambda _: source, collections={"succeeded": 1})
    golden = [
        Exported(exposition.sample_name(one.name, one.type), one.type.name.lower(), one.help, ("target",))
        for one in metrics.signals([target])
    ]
    own = [
        Exported(one.name, one.type, one.help, tuple(next(iter(one.samples)).labels))
        for one in metrics.families(targets, lambda: True, lambda: True, lambda: 0)
    ]
    return golden, own


def queries(one: Exported) -> Iterator[tuple[str, str]]:
    """What a panel asks, and what its lines are called."""
    labels = [label for label in one.labels if label not in ("instance", "kind", "service")]
    legend = " ".join(f"{{{{{label}}}}}" for label in labels) or "{{instance}}"
    series = one.name + (OF_TARGETS if "target" in one.labels else "")
    by = ", ".join(labels) or "instance"
    if one.type == "histogram":
        bucket = f"{one.name}_bucket{OF_TARGETS}"
        for share in ("0.5", "0.99"):
            yield f"histogram_quantile({share}, sum by ({by}, le) (rate({bucket}{RATE})))", f"{legend} p{share[2:]}"
    elif one.type == "counter":
        yield f"sum by ({by}) (rate({series}{RATE}))", legend
    elif one.name.endswith("_timestamp_seconds"):
        yield f"time() - {series}", legend
    else:
        yield f"{series} == 1" if "state" in labels else series, legend


def panel(number: int, one: Exported) -> dict[str, Any]:
    """Lines over time."""
    column, row = number % COLUMNS, number // COLUMNS
    unit = "reqps" if one.type == "counter" else UNITS.get(one.name.rpartition("_")[2], "short")
    asked = enumerate(queries(one))
    return {
        "type": "timeseries",
        "title": one.name,
        "description": one.help,
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [{"refId": "AB"[at], "expr": expr, "legendFormat": legend} for at, (expr, legend) in asked],
    }


def variable(name: str) -> dict[str, Any]:
    """A label to choose by."""
    asked = f"label_values(retinue_adapter_up, {name})"
    return {
        "type": "query",
        "name": name,
        "datasource": SOURCE,
        "query": {"query": asked, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> dict[str, Any]:
    """Golden signals first."""
    golden, own = exported()
    source = {"type": "datasource", "name": "source", "query": "prometheus"}
    return {
        "uid": "retinue-adapter",
        "title": "Retinue: adapter",
        "schemaVersion": 39,
        "tags": ["retinue"],
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, variable("service"), variable("target")]},
        "panels": [panel(number, one) for number, one in enumerate([*golden, *own])],
    }


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=2)
    print()
