"""The adapter's manifests, and its guide: every name that is served is told, and no others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from e2e.pods import ROOT, Manifest, render

from retinue.adapter.v1 import target_pb2 as pb
from retinue_server import command
from retinue_server.adapter import packfile, targetfile
from retinue_server.adapter.config import AdapterSettings
from retinue_server.adapter.core import collection, naming, packs
from retinue_server.adapter.core.points import SIGNALS
from retinue_server.adapter.core.spec import Kind, Spec, State

DEPLOY = ROOT / "deploy/adapter"
GUIDE = (DEPLOY / "README.md").read_text()


@pytest.fixture(scope="module")
def adapter() -> list[Manifest]:
    return render(ROOT / "deploy/overlays/adapter")


def exported() -> list[dict[str, Any]]:
    """The panels of the dashboard."""
    found: list[dict[str, Any]] = json.loads((DEPLOY / "dashboard.json").read_text())["panels"]
    return found


def section(title: str) -> str:
    """Of the guide."""
    (text,) = (part for part in re.split(r"\n###? ", GUIDE) if part.startswith(f"{title}\n"))
    return text


def rows(title: str) -> Iterator[list[str]]:
    """Of the tables of a section, without their heads."""
    for line in section(title).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and not line.startswith("| ---"):
            yield cells


def first_cells(title: str) -> set[str]:
    """What stands in backticks in the first cells."""
    return {word for row in rows(title) for word in re.findall(r"`([^`]+)`", row[0])}


# The guide


def test_the_guide_tells_every_metric_and_no_others() -> None:
    done = subprocess.run([sys.executable, DEPLOY / "dashboard.py"], capture_output=True, text=True, check=True)
    known = {panel["title"] for panel in json.loads(done.stdout)["panels"]}
    assert first_cells("Metrics") == {name for name in known if name.startswith("retinue_")}
    told = set(re.findall(r"`(app_[a-z_]+)`", section("Golden signals")))
    assert told == {name for name in known if name.startswith("app_")}
    assert set(re.findall(r"\bretinue_adapter_[a-z_]+", GUIDE)) <= known


def test_the_guide_tells_every_setting_and_its_default() -> None:
    defaults = msgspec.to_builtins(AdapterSettings())
    defaults |= {f"endpoints.{name}": value for name, value in defaults.pop("endpoints").items()}
    told = {row[0].strip("`"): row[1].strip("`") for row in rows("Settings") if row[0].startswith("`")}
    assert told.keys() == defaults.keys()
    for name, value in defaults.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        assert told[name] == str(value), name


def test_the_guide_tells_every_field_of_a_target_and_its_default() -> None:
    fields = {field.name for field in pb.Target.DESCRIPTOR.fields} - {"status", "etag"}
    told = {row[0].strip("`"): row[1] for row in rows("The file of targets") if row[0].startswith("`")}
    assert told.keys() == fields
    usual = Spec("one", Kind.REDIS)
    assert told["interval_duration"] == f"{usual.interval_s:g} s"
    assert told["timeout_duration"] == f"{usual.timeout_s:g} s"


def test_the_guide_tells_every_kind_and_every_state() -> None:
    assert first_cells("Kinds of targets") == set(Kind.__members__)
    assert first_cells("States of a target") == set(State.__members__)


def test_the_guide_tells_every_reason_for_a_refusal() -> None:
    sources = (ROOT / "services/retinue_server/adapter").rglob("*.py")
    said = "\n".join(path.read_text() for path in sources)
    used = set(re.findall(r'reject(?:ed)?\(\s*"([a-z_]+)"', said))
    listed = set(re.findall(r"\b([a-z]+(?:_[a-z]+)+) {2,}", collection.__doc__ or ""))
    assert len(used | listed) >= 13
    assert used | listed <= first_cells("Refused points")


def test_the_guide_tells_the_golden_signals_of_every_shipped_pack_and_why_one_is_absent() -> None:
    table = {row[0].strip("`"): row[1:-1] for row in rows("Golden signals") if len(row) == 1 + len(SIGNALS) + 1}
    shipped = packfile.shipped()
    assert shipped.keys() <= table.keys()
    for name, pack in shipped.items():
        for signal, cell in zip(SIGNALS, table[name], strict=True):
            rule = pack.signals[signal]  # type: ignore[index]
            can = bool(rule.sums or rule.histograms or rule.ratios)
            assert can != cell.startswith("absent"), (name, signal)
            assert can or cell == f"absent: {rule.absent}", (name, signal)


def test_the_guide_tells_every_key_of_a_rule_pack() -> None:
    assert set(packs.Pack.__struct_fields__) <= first_cells("Rule packs")
    assert set(packs.Rule.__struct_fields__) == first_cells("Rules")
    signal = set(packs.SignalRule.__struct_fields__) | {"unlimited"}
    assert signal == first_cells("Signals of a pack")
    for field in packs.Ratio.__struct_fields__:
        assert f"`{field}`" in section("Signals of a pack")


def test_the_guide_tells_every_unit() -> None:
    (text,) = (part for part in section("Rules").split("\n\n") if part.startswith("Units,"))
    assert set(naming.UNITS) <= set(re.findall(r"`([^`]+)`", text))


def test_the_rules_and_signals_of_the_guide_are_a_pack() -> None:
    text = section("Rules") + section("Signals of a pack")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    pack = packfile.read("guide", ("kind: json\n" + "".join(blocks)).encode())
    assert [rule.metric for rule in pack.metrics] == ["shop_orders", "shop_pause", "shop_is_open", "shop_server"]
    assert pack.signals.keys() == set(SIGNALS)


def test_the_file_of_targets_in_the_guide_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", section("The file of targets"), re.DOTALL)
    (tmp_path / "targets.yaml").write_text(block)
    (spec,) = targetfile.read(tmp_path / "targets.yaml")
    assert (spec.kind, spec.rule_pack, spec.interval_s) == (Kind.JSON, "uwsgi", 15)
    assert spec.rule_pack in packfile.of_directory(DEPLOY / "examples")


# The dashboard


def test_making_the_dashboard_again_gives_the_same_file() -> None:
    done = subprocess.run([sys.executable, DEPLOY / "dashboard.py"], capture_output=True, text=True, check=True)
    assert done.stdout == (DEPLOY / "dashboard.json").read_text(), "python deploy/adapter/dashboard.py > dashboard.json"


def test_no_two_panels_lie_on_each_other() -> None:
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in exported()}
    assert len(places) == len(exported())


# The manifests


def pod(manifests: list[Manifest]) -> Manifest:
    deployments = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "Deployment"}
    found = deployments["my-app"]["template"]
    assert isinstance(found, dict)
    return found


def settings(manifests: list[Manifest], path: Path) -> AdapterSettings:
    """What the server makes of its config map; a mistyped key raises."""
    (text,) = (m["data"]["config.yaml"] for m in manifests if "config.yaml" in m.get("data", {}))
    path.write_text(text)
    _, [loaded] = command.load(command.parser().parse_args(["adapter", "--config", str(path)]), {})
    assert isinstance(loaded.section, AdapterSettings)
    return loaded.section


def test_the_adapter_is_a_native_sidecar_behind_a_startup_probe(adapter: list[Manifest]) -> None:
    (server,) = pod(adapter)["spec"]["initContainers"]
    assert server["restartPolicy"] == "Always"
    assert server["startupProbe"]["grpc"] == {"port": 7174, "service": "retinue.adapter.v1.AdapterService"}


def test_the_app_shares_nothing_with_its_adapter_but_the_network(adapter: list[Manifest]) -> None:
    (app,) = pod(adapter)["spec"]["containers"]
    assert {mount["name"] for mount in app["volumeMounts"]} == {"tmp"}


def test_prometheus_is_told_the_port_of_the_pages(adapter: list[Manifest]) -> None:
    (server,) = pod(adapter)["spec"]["initContainers"]
    (port,) = (port["containerPort"] for port in server["ports"] if port["name"] == "metrics")
    assert pod(adapter)["metadata"]["annotations"]["prometheus.io/port"] == str(port)


def test_the_adapter_reads_files_that_are_mounted_under_names_that_stay(
    adapter: list[Manifest], tmp_path: Path
) -> None:
    said = settings(adapter, tmp_path / "config.yaml")
    assert said.targets is not None
    spec = pod(adapter)["spec"]
    (server,) = spec["initContainers"]
    names = {mount["mountPath"]: mount["name"] for mount in server["volumeMounts"]}
    for path, config_map in ((said.targets.parent, "adapter-targets"), (said.rule_packs, "adapter-rule-packs")):
        assert {"name": names[str(path)], "configMap": {"name": config_map}} in spec["volumes"], "without a hash"


@pytest.mark.parametrize("overlay", ["adapter", "adapter-podman-ci"])
def test_the_files_that_are_mounted_are_a_file_of_targets_and_rule_packs(overlay: str, tmp_path: Path) -> None:
    manifests = render(ROOT / f"deploy/overlays/{overlay}")
    maps = {m["metadata"]["name"]: m["data"] for m in manifests if m["kind"] == "ConfigMap"}
    (tmp_path / "targets.yaml").write_text(maps["adapter-targets"]["targets.yaml"])
    assert [spec.kind for spec in targetfile.read(tmp_path / "targets.yaml")] == [Kind.REDIS, Kind.STATSD]
    for name, text in maps["adapter-rule-packs"].items():
        assert packfile.read(name, text.encode()).kind == "json"


def test_the_overlay_for_podman_leaves_the_adapter_as_it_is_but_for_what_podman_cannot_do(
    adapter: list[Manifest],
) -> None:
    (native,) = pod(adapter)["spec"]["initContainers"]
    moved_pod = pod(render(ROOT / "deploy/overlays/adapter-podman-ci"))
    order = moved_pod["metadata"]["annotations"]["sidecars"]
    (moved,) = (c for c in moved_pod["spec"]["containers"] if c["name"] == order)
    left = {key: value for key, value in native.items() if key not in ("restartPolicy", "ports", "livenessProbe")}
    assert moved | {"image": ""} == left | {"image": ""}


def test_the_scrape_configuration_of_the_guide_keeps_pods_with_the_annotation_and_dials_the_pages() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", section("Prometheus"), re.DOTALL)
    (job,) = yaml.safe_load(block)["scrape_configs"]
    assert job["honor_labels"] is True
    assert job["relabel_configs"][0]["source_labels"] == ["__meta_kubernetes_pod_annotation_prometheus_io_scrape"]
    assert job["relabel_configs"][1]["replacement"] == "$1:7274"
