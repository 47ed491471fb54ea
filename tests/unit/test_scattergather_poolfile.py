"""Claims about the pool file: what it may say, what is said of a wrong one, and when a changed one is taken."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from retinue_server import command
from retinue_server.runtime import strict_yaml
from retinue_server.runtime.addresses import StartError
from retinue_server.scattergather import poolwatch
from retinue_server.scattergather.core.topology import LEAF_METHOD, Hedging, MergeKind, Merging, Pool, PoolLimits, Shard
from retinue_server.scattergather.engine import Tls
from retinue_server.scattergather.poolfile import (
    BudgetEntry,
    HedgingEntry,
    LimitsEntry,
    PoolEntry,
    PoolFileError,
    ShardEntry,
    UnreadableError,
    read,
)
from retinue_server.scattergather.poolwatch import PoolFile

ONE = "pools: {p: {shards: [{shard_id: a, endpoints: ['leaf:1']}]}}"
TWO = "pools: {p: {shards: [{shard_id: a, endpoints: ['leaf:1']}, {shard_id: b, endpoints: ['leaf:2']}]}}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pools.yaml"


def refusal(path: Path, text: str | bytes) -> str:
    """What is said of a file with this text."""
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(PoolFileError) as refused:
        read(path)
    assert str(path) in str(refused.value)
    return str(refused.value)


def said_of(path: Path, pool: str) -> str:
    """What is said of a pool `p`, given in YAML's flow style without its shards."""
    return refusal(path, f"pools: {{p: {{shards: [{{shard_id: a, endpoints: ['h:1']}}], {pool}}}}}")


def said_of_source(path: Path, source: str) -> str:
    return refusal(path, f"pools: {{p: {{shards: [{{shard_id: a, endpoints: [{source!r}]}}]}}}}")


# What it says


def test_a_pool_is_as_its_file_says(path: Path) -> None:
    path.write_text("""
        pools:
          search:
            merge: top_k
            top_k: 10
            timeout_seconds: 2
            hedging: {quantile: 0.9}
            limits: {max_reply_bytes: 1000}
            forward_metadata: [x-user]
            tls: {ca_file: /ca.pem, server_name: leaf}
            shards:
              - {shard_id: s0, endpoints: ["10.0.0.1:9000", "unix:/run/leaf.sock"], weight: 3}
              - {shard_id: s1, endpoints: ["dns:search-1.example:9000", "kubernetes:search-1.prod:grpc"], pool: below}
    """)
    (pool,) = read(path)
    assert pool == Pool(
        "search",
        (
            Shard("s0", ("10.0.0.1:9000", "unix:/run/leaf.sock"), 3),
            Shard("s1", ("dns:search-1.example:9000", "kubernetes:search-1.prod:grpc"), 1, "below"),
        ),
        merging=Merging(MergeKind.TOP_K, 10),
        timeout_s=2,
        hedging=Hedging(quantile=0.9),
        limits=PoolLimits(max_reply_bytes=1000),
        forward_metadata=("x-user",),
        tls=Tls(ca_file="/ca.pem", server_name="leaf"),
    )


def test_what_a_pool_leaves_out_is_the_default_of_the_core(path: Path) -> None:
    path.write_text(ONE)
    assert read(path) == [Pool("p", (Shard("a", ("leaf:1",)),))]


def test_defaults_can_be_written_once_and_merged_into_pools(path: Path) -> None:
    path.write_text("""
        pools:
          a: &usual
            timeout_seconds: 3
            shards: [{shard_id: s, endpoints: ["h:1"]}]
          b:
            <<: *usual
            timeout_seconds: 4
    """)
    assert [(pool.pool_id, pool.timeout_s, len(pool.shards)) for pool in read(path)] == [("a", 3, 1), ("b", 4, 1)]


@pytest.mark.parametrize(
    "source",
    [
        "leaf:9000",
        "Leaf_1.example.com.:9000",
        "10.0.0.1:65535",
        "[2001:db8::1]:9000",
        "[fe80::1%eth0]:9000",
        "unix:/run/leaf.sock",
        "dns:leaf.example.com:9000",
        "dns:[::1]:9000",
        "kubernetes:leaf:9000",
        "kubernetes:leaf:grpc",
        "kubernetes:leaf-1.prod:grpc-web",
    ],
)
def test_an_endpoint_may_be(path: Path, source: str) -> None:
    path.write_text(f"pools: {{p: {{shards: [{{shard_id: a, endpoints: [{source!r}]}}]}}}}")
    assert read(path)[0].shards[0].sources == (source,)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "leaf",
        "leaf:0",
        "leaf:grpc",
        "leaf:65536",
        "a b:1",
        "http://leaf:1",
        "leaf/x:1",
        "::1:9000",
        "[leaf]:1",
        "[::g]:1",
        "unix:",
        "dns:",
        "dns:leaf",
        "dns:leaf:grpc",
        "dns:unix:/run/x",
        f"dns:{'a' * 64}.example:1",
        f"dns:{'a.' * 127}bc:1",
        "dns:b\u00fccher.example:1",
        "kubernetes:leaf",
        "kubernetes:leaf:0",
        "kubernetes:leaf:65536",
        "kubernetes:leaf:-grpc",
        "kubernetes:Leaf:1",
        "kubernetes:leaf.a.b:1",
        "kubernetes:unix:/run/x",
        "consul:leaf:1",
    ],
)
def test_an_endpoint_may_not_be(path: Path, source: str) -> None:
    said = said_of_source(path, source)
    assert "pools.p.shards[0].endpoints: " in said
    assert "kubernetes:SERVICE[.NAMESPACE]:PORT" in said


# What is said of a wrong one


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "`pools: {}` is none"),
        ("# nothing", "`pools: {}` is none"),
        ("pools:", "`pools: {}` is none"),
        ("pools: []", "a mapping of names to pools"),
        ("[pools]", "a mapping of names to pools"),
        ("pools: {}\nversion: 1", "the one key `pools`"),
        ("pools: {1: {shards: []}}", "pools.1: the name must be text; put it in quotes"),
        ("pools: {no: {shards: []}}", "pools.False: the name must be text"),
        ("pools: {-a: {shards: []}}", "pools.-a: the name must be 1 to 128"),
        ("pools: {p: }", "pools.p: Expected `object`, got `null`"),
        ("pools: {p: {}}", "pools.p: Object missing required field `shards`"),
        (
            "pools: {p: {shards: [{shard_id: 7, endpoints: []}]}}",
            "shards[0].shard_id: Expected `str`, got `int`; put it",
        ),
        ("pools: {p: {shards: [{shard_id: a, endpoints: []}]}}", "pools.p.shards[0].endpoints: must be one or more"),
        ("pools: {p: {shard: []}}", "unknown key shard, did you mean shards?"),
        (
            "pools: {p: {shards: [{shard_id: a, endpoint: []}]}}",
            "pools.p.shards[0]: unknown key endpoint, did you mean",
        ),
        ("pools: {p: {shards: []}}\npools: {}", "line 2 has the key pools a second time"),
        ("pools:\n  p: {shards: []}\n  p: {shards: []}", "line 3 has the key p a second time"),
        ("pools: {p: {shards: []}", "expected ',' or '}'"),
        ("pools: {}\n---\npools: {}", "expected a single document"),
        ("pools: {p: !!python/object:os.system x}", "could not determine a constructor"),
        ("pools: {p: !!timestamp x}", "cannot use the pool file"),
        ("pools: {p: 2001-99-99}", "month must be in 1..12"),
        pytest.param("pools: " + "[" * 100_000, "line 1 nests deeper than 64", id="deep"),
        pytest.param("".join(" " * n + "-\n" for n in range(100)), "nests deeper than 64", id="indented"),
        ("pools: &p {p: *p}", "pools.p: unknown key p"),
        (b"pools: {\xff: 1}", "invalid leading UTF-8 octet"),
        (b"pools: {a\x00: 1}", "control characters are not allowed"),
        pytest.param(b"#" * (8 * 1024 * 1024 + 1), "it is larger than 8 MiB", id="large"),
    ],
)
def test_a_wrong_file_is_refused_and_told_what_is_wrong(path: Path, text: str | bytes, said: str) -> None:
    assert said in refusal(path, text)


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ("merge: sun", "pools.p.merge: must be one of collect, concat, first, sum"),
        ("merge: SUM", "pools.p.merge: must be one of"),
        ("merge: top_k", "pools.p.top_k: must be 1 or more"),
        ("top_k: 3", "pools.p.top_k: must be 1 or more for merge top_k, and is for no other"),
        ("merge: service", "pools.p.merge_address: must be there"),
        ("merge: service, merge_address: nowhere", "pools.p.merge_address: must be HOST:PORT or unix:PATH"),
        ("commutative: true", "pools.p.commutative: is for merge service"),
        ("merge: sum, replies: json", "pools.p.replies: is for merge collect"),
        ("method: Query", "pools.p.method: must be /package.Service/Method"),
        ("method: /a.B/C, batch: true", "pools.p.batch: only leaves that serve LeafService have it"),
        ("method: /a.B/C, transport: stream", "pools.p.transport: only leaves"),
        ("limits: {max_reply_bytes: 2, max_gathered_bytes: 1}", "pools.p.limits.max_reply_bytes: must be at most"),
        ("forward_metadata: [grpc-timeout]", "'grpc-timeout' is no key"),
        ("forward_metadata: [X-User]", "'X-User' is no key"),
        ("forward_metadata: [x-bin]", "'x-bin' is no key"),
        ("tls: {cert_file: a}", "pools.p.tls: cert_file and key_file need each other"),
        ("tsl: {}", "pools.p: unknown key tsl, did you mean tls?"),
        ("tls: {ca-file: a}", "pools.p.tls: unknown key ca-file, did you mean ca_file?"),
        ("hedging: {ratio: 1}", "pools.p.hedging: unknown key ratio, known are enabled"),
        ("tls: {ca: a}", "pools.p.tls: unknown key ca, known are ca_file, cert_file, key_file, server_name"),
        ("hedging: {quantile: 1}", "pools.p.hedging.quantile: Expected `float` < 1"),
        ("budget: {ratio: 2}", "pools.p.budget.ratio: Expected `float` <= 1"),
        ("timeout_seconds: 0", "pools.p.timeout_seconds: Expected `float` > 0"),
        ("max_retries: two", "pools.p.max_retries: Expected `int`, got `str`"),
    ],
)
def test_a_wrong_pool_is_refused_and_told_what_is_wrong(path: Path, pool: str, said: str) -> None:
    assert said in said_of(path, pool)


def test_all_mistakes_are_told_at_once(path: Path) -> None:
    said = refusal(path, "pools: {a: {shards: [{shard_id: -, endpoints: [x]}], top_k: 1}, b: {}}")
    for part in (
        "pools.a.top_k",
        "pools.a.shards[0].shard_id",
        "pools.a.shards[0].endpoints",
        "pools.b: Object missing",
    ):
        assert part in said


def test_of_a_thousand_mistakes_the_first_are_told_and_the_others_counted(path: Path) -> None:
    said = refusal(path, "pools: {" + ", ".join(f"p{n}: {{}}" for n in range(1000)) + "}")
    assert "; and 980 more" in said
    assert len(said) < 5_000


def test_a_shard_stands_once_in_a_pool(path: Path) -> None:
    said = refusal(path, "pools: {p: {shards: [{shard_id: a, endpoints: ['h:1']}, {shard_id: a, endpoints: ['h:2']}]}}")
    assert "pools.p.shards[1].shard_id: a is there already" in said


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe"):
        with pytest.raises(PoolFileError, match="it is no file"):
            read(tmp_path / name)


def test_a_file_that_cannot_be_read_is_another_matter_than_a_wrong_one(path: Path) -> None:
    path.symlink_to(path)
    with pytest.raises(UnreadableError, match="Too many levels of symbolic links"):
        read(path)
    path.unlink()
    with pytest.raises(UnreadableError, match="No such file"):
        read(path)


def test_thousands_of_shards_are_read(path: Path) -> None:
    path.write_text(
        "pools:\n  p:\n    shards:\n"
        + "".join(f"      - {{shard_id: s{n}, endpoints: ['10.0.0.1:9000', '10.0.0.2:9000']}}\n" for n in range(3000))
    )
    assert len(read(path)[0].shards) == 3000


def test_an_alias_that_is_repeated_is_no_repeated_key() -> None:
    assert strict_yaml.load(b"a: &x {k: 1}\nb: *x\nc: {<<: *x, k: 2}") == {"a": {"k": 1}, "b": {"k": 1}, "c": {"k": 2}}


# When it is taken


class Applied:
    """What was applied, at each time."""

    def __init__(self) -> None:
        self.pools: list[Sequence[Pool]] = []
        self._more = asyncio.Event()

    def __call__(self, pools: Sequence[Pool]) -> None:
        self.pools.append(pools)
        self._more.set()

    @property
    def shards(self) -> list[int]:
        """How many the pools had, each time."""
        return [sum(len(pool.shards) for pool in pools) for pools in self.pools]

    async def next(self) -> None:
        self._more.clear()
        await asyncio.wait_for(self._more.wait(), 60)


@pytest.fixture
def applied() -> Applied:
    return Applied()


@pytest.fixture
async def file(path: Path, applied: Applied) -> PoolFile:
    """A started one that looks when the test says so."""
    path.write_text(ONE)
    file = PoolFile(path, applied, must_exist=True, look_s=3600)
    await file.start()
    await file.look()
    await file.stop()
    return file


async def looks(file: PoolFile, times: int = 2) -> None:
    for _ in range(times):
        await file.look()


async def test_what_is_there_at_the_start_is_served_once(file: PoolFile, applied: Applied) -> None:
    assert applied.shards == [1]
    await looks(file, 5)
    assert applied.shards == [1]


def by_rename(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)


def in_place(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize("change", [by_rename, in_place])
async def test_a_changed_file_is_served(
    file: PoolFile, applied: Applied, path: Path, change: Callable[[Path, str], None]
) -> None:
    change(path, TWO)
    await looks(file)
    assert applied.shards == [1, 2]
    change(path, "pools: {}")
    await looks(file)
    assert applied.shards == [1, 2, 0]


async def test_a_file_of_a_config_map_is_served_when_its_directory_is_swapped(tmp_path: Path, applied: Applied) -> None:
    for number, text in enumerate((ONE, TWO)):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "pools.yaml").write_text(text)
    (tmp_path / "..data").symlink_to("..0")
    (tmp_path / "pools.yaml").symlink_to("..data/pools.yaml")
    file = PoolFile(tmp_path / "pools.yaml", applied, must_exist=True, look_s=3600)
    await file.start()
    (tmp_path / "..data_tmp").symlink_to("..1")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    await looks(file)
    await file.stop()
    assert applied.shards == [1, 2]


async def test_a_half_written_file_is_not_taken_even_if_its_half_is_right(
    file: PoolFile, applied: Applied, path: Path
) -> None:
    whole = "pools:\n  p:\n    shards:\n" + "".join(f"    - {{shard_id: s{n}, endpoints: ['h:1']}}\n" for n in range(6))
    lines = whole.splitlines(keepends=True)
    for end in range(4, len(lines) + 1):
        path.write_text("".join(lines[:end]))
        await looks(file, 1)
    assert applied.shards == [1]
    await looks(file, 1)
    assert applied.shards == [1, 6]


async def test_a_file_that_changes_while_it_is_read_is_read_again(
    file: PoolFile, applied: Applied, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed_amid(path: Path) -> Sequence[Pool]:
        monkeypatch.undo()
        pools = read(path)
        path.write_text("pools: {}")
        return pools

    path.write_text(TWO)
    monkeypatch.setattr(poolwatch, "read", changed_amid)
    await looks(file, 4)
    assert applied.shards == [1, 0]


async def test_what_was_started_amid_a_change_is_read_once_more(
    path: Path, applied: Applied, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the change is so quick that the file looks the same."""
    path.write_text(ONE)
    file = PoolFile(path, applied, must_exist=True, look_s=3600)
    monkeypatch.setattr(poolwatch, "_stamp", lambda _: (1, 2, 3, 4))
    await file.start()
    path.write_text(TWO)
    await looks(file, 1)
    await file.stop()
    assert applied.shards == [1, 2]


@pytest.mark.parametrize(
    "text", ["", "pools:", "pools: {p: {}}", "pools: [", "pools: {p: {shards: []}, p: {shards: []}}"]
)
async def test_a_wrong_file_leaves_what_is_served_and_the_log_says_so_once(
    file: PoolFile, applied: Applied, path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(text)
    await looks(file, 5)
    assert not file.ok
    assert applied.shards == [1]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.message.startswith(f"cannot use the pool file {path}: ")
    assert record.message.endswith("; the pools stay as they were")
    path.write_text(TWO)
    await looks(file)
    assert file.ok
    assert applied.shards == [1, 2]


async def test_a_file_that_is_gone_leaves_what_is_served_and_is_taken_when_it_is_back(
    file: PoolFile, applied: Applied, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.unlink()
    await looks(file, 5)
    assert not file.ok
    assert [record.message for record in caplog.records] == [
        f"cannot read the pool file {path}: No such file or directory; the pools stay as they were"
    ]
    path.write_text(ONE)
    await looks(file)
    assert file.ok
    path.write_text(TWO)
    await looks(file)
    assert applied.shards[-1] == 2


async def test_what_hindered_reading_may_go_without_a_trace_in_the_file(
    file: PoolFile, applied: Applied, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def hindered(path: Path) -> Sequence[Pool]:
        raise UnreadableError(path, PermissionError(13, "Permission denied"))

    path.write_text(TWO)
    monkeypatch.setattr(poolwatch, "read", hindered)
    await looks(file, 3)
    assert not file.ok
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        f"cannot read the pool file {path}: Permission denied; the pools stay as they were"
    ]
    monkeypatch.undo()
    await looks(file, 1)
    assert file.ok
    assert applied.shards == [1, 2]


async def test_a_file_whose_mode_alone_changed_is_read_again(
    file: PoolFile, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []

    def noted(path: Path) -> Sequence[Pool]:
        reads.append(path)
        return read(path)

    monkeypatch.setattr(poolwatch, "read", noted)
    path.chmod(0o600)
    await looks(file)
    assert reads == [path]


async def test_pools_that_cannot_be_served_leave_what_is_served(
    path: Path, applied: Applied, caplog: pytest.LogCaptureFixture
) -> None:
    def prepare(pools: Sequence[Pool]) -> None:
        if len(pools[0].shards) > 1:
            raise StartError("cannot find endpoints: install it")

    path.write_text(ONE)
    file = PoolFile(path, applied, must_exist=True, prepare=prepare, look_s=3600)
    await file.start()
    path.write_text(TWO)
    await looks(file, 4)
    await file.stop()
    assert not file.ok
    assert applied.shards == [1]
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert errors == ["cannot find endpoints: install it; the pools stay as they were"]
    with pytest.raises(StartError, match="install it"):
        await PoolFile(path, applied, must_exist=True, prepare=prepare).start()


async def test_what_nobody_thought_of_does_not_end_the_looking(
    path: Path, applied: Applied, caplog: pytest.LogCaptureFixture
) -> None:
    broken = True

    def apply(pools: Sequence[Pool]) -> None:
        if broken and len(pools[0].shards) > 1:
            raise ZeroDivisionError
        applied(pools)

    path.write_text(ONE)
    file = PoolFile(path, apply, must_exist=True, look_s=3600)
    await file.start()
    path.write_text(TWO)
    await looks(file, 4)
    assert not file.ok
    assert sum(record.exc_info is not None for record in caplog.records) == 1
    broken = False
    await looks(file, 1)
    await file.stop()
    assert file.ok
    assert applied.shards == [1, 2]


async def test_it_looks_of_itself_until_it_is_stopped(path: Path, applied: Applied) -> None:
    path.write_text(ONE)
    file = PoolFile(path, applied, must_exist=True, look_s=0.01)
    await file.stop()
    await file.start()
    await file.start()
    path.write_text(TWO)
    await applied.next()
    await file.stop()
    await file.stop()
    assert applied.shards == [1, 2]


# Starting


async def test_a_file_that_was_named_must_be_there_and_right(path: Path, applied: Applied) -> None:
    with pytest.raises(StartError, match="No such file"):
        await PoolFile(path, applied, must_exist=True).start()
    path.write_text("pools: 3")
    for must_exist in (True, False):
        with pytest.raises(StartError, match="cannot use the pool file"):
            await PoolFile(path, applied, must_exist=must_exist).start()
    assert applied.pools == []


async def test_a_file_that_nobody_named_may_come_later(path: Path, applied: Applied) -> None:
    file = PoolFile(path, applied, must_exist=False, look_s=3600)
    await file.start()
    await looks(file, 3)
    assert file.ok
    assert applied.pools == []
    path.write_text(ONE)
    await looks(file)
    await file.stop()
    assert applied.shards == [1]


async def test_a_file_that_is_there_and_cannot_be_read_is_no_missing_one(path: Path, applied: Applied) -> None:
    path.symlink_to(path)
    with pytest.raises(StartError, match="Too many levels"):
        await PoolFile(path, applied, must_exist=False).start()


def test_a_leaf_of_ours_is_the_default_method() -> None:
    assert Pool("p", ()).method == LEAF_METHOD


# What operators are told


README = Path(__file__).parents[2] / "deploy" / "scattergather" / "README.md"
PARTS: dict[str, type[msgspec.Struct]] = {
    "## The pool file": PoolEntry,
    "### `shards`": ShardEntry,
    "### `hedging`": HedgingEntry,
    "### `budget`": BudgetEntry,
    "### `limits`": LimitsEntry,
    "## TLS to leaves": Tls,
}


def rows_of(title: str) -> list[str]:
    """Of the first table after a heading."""
    lines = iter(README.read_text().splitlines())
    assert any(line == title for line in lines), title
    after = list(itertools.dropwhile(lambda line: not line.startswith("| key"), lines))
    return list(itertools.takewhile(lambda line: line.startswith("|"), after))[2:]


def documented(title: str) -> dict[str, str]:
    """The default of each key, as the table has it."""
    cells = [row.split(" | ") for row in rows_of(title)]
    return {cell[0].strip("| `"): cell[1] for cell in cells}


def told(default: object) -> str:
    """A default as a table has it."""
    if default is msgspec.NODEFAULT:
        return "required"
    if isinstance(default, msgspec.Struct):
        return "below"
    if default in ("", (), None):
        return "none"
    return str(default).lower() if isinstance(default, bool) else str(default)


@pytest.mark.parametrize("title", PARTS)
def test_every_key_of_the_schema_is_documented_with_its_default(title: str) -> None:
    fields = {field.name: told(field.default) for field in msgspec.structs.fields(PARTS[title])}
    said = {key: "below" if "[below]" in default else default for key, default in documented(title).items()}
    assert said == fields


def test_every_merge_is_documented() -> None:
    (row,) = [row for row in rows_of("## The pool file") if row.startswith("| `merge` ")]
    assert all(f"`{kind.name.lower()}`" in row for kind in MergeKind)


def test_the_examples_of_readme_and_help_are_pool_files(path: Path) -> None:
    readme = README.read_text().partition("## The pool file")[2].partition("```yaml\n")[2].partition("```")[0]
    shown = command.parser(["scattergather", "--help"]).format_help().partition("  pools:\n")[2].partition("\nAll")[0]
    for example in (readme, f"  pools:\n{shown}"):
        path.write_text(example)
        (pool,) = read(path)
        assert [shard.shard_id for shard in pool.shards] == ["s0", "s1", "s2"]


def test_the_help_about_another_pattern_says_nothing_of_pools() -> None:
    assert "pool file" not in command.parser(["workqueue", "--help"]).format_help()
