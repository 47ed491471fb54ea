"""What `make demo DEMO=adapter` shows: signals that follow a load, errors, and an app that goes and comes back."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from e2e.test_demo import demo

COLUMNS = ("state", "requests", "errors", "duration", "saturation")


def tables(said: str) -> dict[str, dict[str, dict[str, str]]]:
    """Cells by title, target and column."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for title, body in re.findall(r"^(\S.*?) *\n┏.*\n┃.*\n┡.*\n((?:│.*\n)+)", said, re.MULTILINE):
        for row in body.splitlines():
            name, *cells = [cell.strip() for cell in row.strip("│").split("│")]
            found.setdefault(title, {})[name] = dict(zip(COLUMNS, cells, strict=True))
    return found


def percent(cell: str) -> int:
    return int(cell.removesuffix("%"))


@pytest.mark.timeout(900)
def test_the_demo_of_the_adapter_ends_well() -> None:
    apps = ["redis-server", "nginx", "memcached"]
    if missing := [name for name in apps if shutil.which(name) is None]:
        pytest.skip(f"needs {' and '.join(missing)}: apt-get install redis-server nginx-light memcached")
    said = demo("adapter")
    shown = tables(said)
    calm, full, wrong, stale, down, back = shown.values()
    assert all(row["state"] == "UP" and float(row["requests"]) > 0 for row in calm.values())
    assert percent(calm["redis"]["saturation"]) < 75 < percent(full["redis"]["saturation"])
    assert float(calm["redis"]["errors"]) == 0 < float(wrong["redis"]["errors"])
    assert calm["nginx"]["errors"] == calm["redis"]["duration"] == "absent"
    assert calm["queue"]["duration"].endswith(" ms")
    assert [one["redis"]["state"] for one in (stale, down, back)] == ["STALE", "DOWN", "UP"]
    assert stale["redis"]["saturation"] != "absent", "what it said last stands"
    assert set(down["redis"].values()) == {"DOWN", "absent"}
    assert float(back["redis"]["requests"]) > 0
    assert re.search("^UP all the while: .+$", said, re.MULTILINE)
    page = re.findall(r'^app_(\w+?)\{.*target="(\w+)"\} \S+$', said, re.MULTILINE)
    assert {target for name, target in page if name == "requests_total"} == {"redis", "nginx", "memcached", "queue"}
    assert "4 apps, as many ways to tell, one set of names" in said


@pytest.mark.timeout(900)
def test_the_demo_of_the_adapter_goes_without_what_is_not_here(tmp_path: Path) -> None:
    said = demo("adapter", PATH=str(tmp_path), DEMO_STATE=str(tmp_path / "state"))
    assert "left out, since they are not here: memcached, nginx, redis-server" in said
    *_, stale, down, back = tables(said).values()
    assert [one["queue"]["state"] for one in (stale, down, back)] == ["STALE", "DOWN", "UP"]
    assert "ways to tell" not in said
