"""Claims about the life of a process, in this process and in one of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import aio
from support import echo
from support.echo import Echo
from support.serving import dial, running, settings

from retinue_server.runtime import wiring
from retinue_server.runtime.addresses import StartError
from retinue_server.runtime.errors import ResourceExhausted
from retinue_server.runtime.lifecycle import DataDirLock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

COMMAND = """
import sys
from retinue_server import command
command.PATTERNS = {"workqueue": "support.echo_wiring"}
sys.exit(command.main())
"""


class Recorder:
    """A part that notes its life, and fails when asked to."""

    def __init__(self, name: str, log: list[str], fail: str = "") -> None:
        self._name, self._log, self._fail = name, log, fail

    async def start(self) -> None:
        self._do("start")

    async def stop(self) -> None:
        self._do("stop")

    def _do(self, what: str) -> None:
        self._log.append(f"{what} {self._name}")
        if self._fail == what:
            raise RuntimeError(f"{what} of {self._name}")


async def test_parts_start_in_order_and_stop_in_reverse(tmp_path: Path) -> None:
    log: list[str] = []
    parts = [Recorder("a", log), Recorder("b", log)]
    async with running(settings(tmp_path), echo.EchoServicer(), parts=parts):
        assert log == ["start a", "start b"]
    assert log == ["start a", "start b", "stop b", "stop a"]


async def test_a_part_that_fails_at_start_stops_those_before_it(tmp_path: Path) -> None:
    log: list[str] = []
    parts = [Recorder("a", log), Recorder("b", log, fail="start"), Recorder("c", log)]
    with pytest.raises(RuntimeError, match="start of b"):
        async with running(settings(tmp_path), echo.EchoServicer(), parts=parts):
            pass
    assert log == ["start a", "start b", "stop b", "stop a"]
    assert not (tmp_path / "c.sock").exists()


async def test_a_part_whose_engine_refuses_at_start_is_a_start_error_with_its_cause(tmp_path: Path) -> None:
    class Full(Recorder):
        async def start(self) -> None:
            raise ResourceExhausted("cannot write: the disk is full") from OSError("28")

    patterns = [echo.pattern(echo.EchoServicer(), parts=[Full("a", [])])]
    process = await wiring.build(settings(tmp_path), patterns)
    with pytest.raises(StartError, match=r"^cannot write: the disk is full: 28$"):
        await process.start()


async def test_a_part_that_cannot_stop_keeps_no_other_from_it(tmp_path: Path) -> None:
    log: list[str] = []
    parts = [Recorder("a", log), Recorder("b", log, fail="stop")]
    with pytest.raises(ExceptionGroup, match="cannot stop cleanly"):
        async with running(settings(tmp_path), echo.EchoServicer(), parts=parts):
            pass
    assert log[-1] == "stop a"


async def test_stop_before_start_and_double_stop_do_nothing(tmp_path: Path) -> None:
    log: list[str] = []
    where = settings(tmp_path, http="127.0.0.1:0", probe="127.0.0.1:0", metrics="127.0.0.1:0")
    process = await wiring.build(where, [echo.pattern(echo.EchoServicer(), parts=[Recorder("a", log)])])
    await process.stop()
    await process.stop()
    assert log == []
    process = await wiring.build(where, [echo.pattern(echo.EchoServicer(), parts=[Recorder("a", log)])])
    await process.start()
    await asyncio.gather(process.stop(), process.stop())
    await process.stop()
    assert log == ["start a", "stop a"]


async def test_a_drain_lets_open_calls_end_and_refuses_new_ones(tmp_path: Path) -> None:
    servicer = echo.EchoServicer()
    quiesced = asyncio.Event()

    async def quiesce() -> None:
        quiesced.set()

    async with (
        running(settings(tmp_path, drain_seconds=120), servicer, quiesce=quiesce) as process,
        dial(process.addresses["listen"][0]) as client,
    ):
        waiting = asyncio.ensure_future(client.Wait(Echo(text="done")))
        assert await servicer.events.get() == "waits"
        stopping = asyncio.create_task(process.stop())
        await quiesced.wait()
        async with asyncio.timeout(60):  # gRPC may leave one that comes just then until the end
            while await client.Say(Echo(), timeout=2).code() is not grpc.StatusCode.UNAVAILABLE:
                await asyncio.sleep(0)
        assert not stopping.done()
        servicer.release.set()
        assert (await waiting).text == "done"
        await stopping


async def test_the_drains_deadline_ends_what_is_still_open(tmp_path: Path) -> None:
    servicer = echo.EchoServicer()

    async def quiesce() -> None:
        await asyncio.Event().wait()  # a pattern that does not come to rest

    async with (
        running(settings(tmp_path, drain_seconds=0.2), servicer, quiesce=quiesce) as process,
        dial(process.addresses["listen"][0]) as client,
    ):
        waiting = asyncio.ensure_future(client.Wait(Echo()))
        assert await servicer.events.get() == "waits"
        async with asyncio.timeout(60):
            await process.stop()
        assert await servicer.events.get() == "wait cancelled"
        with pytest.raises(aio.AioRpcError):
            await waiting


async def test_an_idle_reflection_stream_does_not_hold_the_drain(tmp_path: Path) -> None:
    async with running(settings(tmp_path, drain_seconds=120), echo.EchoServicer()) as process:
        address = process.addresses["listen"][0]
        async with aio.insecure_channel(address) as channel:
            ask: Any = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
            call = ask()
            await call.write(b"\x3a\x00")  # list_services
            await call.read()
            async with asyncio.timeout(60):
                await process.stop()
            assert await call.code() is grpc.StatusCode.OK


async def test_a_data_directory_is_for_one_process(tmp_path: Path) -> None:
    lock, second = DataDirLock(tmp_path / "d"), DataDirLock(tmp_path / "d")
    await lock.stop()
    await lock.start()
    await lock.start()
    with pytest.raises(StartError, match=rf"pid {os.getpid()} \(.*--data-dir"):
        await second.start()
    await second.stop()
    await lock.stop()
    await lock.stop()
    await second.start()
    assert (tmp_path / "d" / "lock").read_text() == f"{os.getpid()}\n"
    await second.stop()


class Server:
    """The command in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.ready: dict[str, Any] = {}

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await self.process.stdout.readline()).decode()

    async def until(self, text: str) -> str:
        """Reads stderr up to a line with the text."""
        assert self.process.stderr is not None
        while text not in (line := (await self.process.stderr.readline()).decode()):
            assert line, f"the process ended without {text!r}"
        return line


@asynccontextmanager
async def command(tmp_path: Path, *arguments: str, code: str = COMMAND) -> AsyncIterator[Server]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RETINUE_", "OTEL_"))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments, cwd=tmp_path, stdout=-1, stderr=-1, env=environment
    )
    try:
        yield Server(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_the_command_says_where_it_listens_and_ends_on_sigterm(tmp_path: Path) -> None:
    arguments = ["workqueue", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--ready-file", "ready"]
    async with command(tmp_path, *arguments) as server:
        ready = json.loads(await server.line())
        assert ready["event"] == "ready"
        assert ready["pid"] == server.process.pid
        assert ready["control"] == "unix:.retinue/control.sock"
        assert (ready["probe"], ready["metrics"]) == (None, None)
        assert ready["http"].startswith("127.0.0.1:")
        assert json.loads((tmp_path / "ready").read_text()) == ready
        await server.until(f"pid {server.process.pid}")
        await server.until("echo: greets with hello")
        async with dial(ready["listen"][0]) as client:
            assert (await client.Say(Echo(text="hi"))).text == "hi"
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(server.process.wait(), 60) == 0
        assert not (tmp_path / ".retinue" / "control.sock").exists()


async def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        async with command(tmp_path, "workqueue", "--listen", "127.0.0.1:0") as server:
            ready = json.loads(await server.line())
            async with dial(ready["listen"][0]) as client:
                waiting = asyncio.ensure_future(client.Wait(Echo()))
                await client.Say(Echo())  # one connection keeps the order: the first call has arrived too
                server.process.send_signal(number)
                await server.until("draining")
                assert server.process.returncode is None
                server.process.send_signal(number)
                assert await asyncio.wait_for(server.process.wait(), 60) == 128 + number
                with pytest.raises(aio.AioRpcError):
                    await waiting


async def test_a_signal_while_it_starts_stops_what_has_started(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from retinue_server import command
from support import echo, echo_wiring
class Slow:
    async def start(self):
        print("starting", flush=True)
        await asyncio.Event().wait()
    async def stop(self):
        print("stopped", flush=True)
async def wire(*_):
    return echo.pattern(echo.EchoServicer(), parts=[Slow()])
echo_wiring.wire = wire
command.PATTERNS = {"workqueue": "support.echo_wiring"}
sys.exit(command.main())
"""
    async with command(tmp_path, "workqueue", "--listen", "127.0.0.1:0", code=code) as server:
        assert await server.line() == "starting\n"
        server.process.send_signal(signal.SIGTERM)
        assert await server.line() == "stopped\n"
        assert await asyncio.wait_for(server.process.wait(), 60) == 0


async def test_a_signal_while_modules_load_ends_the_process_even_where_the_default_is_to_ignore_it(
    tmp_path: Path,
) -> None:
    code = """
import os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the kernel has it for the first process of a container
class Early:
    def find_spec(self, name, *_):
        if name == "retinue_server.runtime.lifecycle":
            os.kill(os.getpid(), signal.SIGTERM)
from retinue_server import __main__ as entry
sys.meta_path.insert(0, Early())
sys.exit(entry.main())
"""
    async with command(tmp_path, "workqueue", "--listen", "127.0.0.1:0", code=code) as server:
        assert await asyncio.wait_for(server.process.wait(), 60) == 128 + signal.SIGTERM


async def test_a_taken_port_is_one_message_and_exit_code_1(tmp_path: Path) -> None:
    async with running(settings(tmp_path), echo.EchoServicer()) as process:
        taken = process.addresses["listen"][0]
        async with command(tmp_path, "workqueue", "--listen", taken) as server:
            out, err = await server.process.communicate()
    assert server.process.returncode == 1
    assert out == b""
    assert err.decode().startswith(f"retinue-server: cannot listen on {taken}: pid {os.getpid()}")
    assert err.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["workqueue", "--listen", "nowhere"], "'nowhere' is no address"),
        (["nopattern"], "unknown pattern nopattern: this release has workqueue"),
        (["--config", "missing.yaml"], "cannot read missing.yaml"),
    ],
)
async def test_wrong_settings_are_one_message_and_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    async with command(tmp_path, *arguments) as server:
        _, err = await server.process.communicate()
    assert server.process.returncode == 2
    assert message in err.decode()
    assert err.count(b"\n") == 1


async def test_a_failed_fsync_ends_the_process_with_70(tmp_path: Path) -> None:
    code = "from retinue_server.runtime.lifecycle import fatal; fatal(OSError('disk on fire')); print(1)"
    async with command(tmp_path, code=code) as server:
        out, err = await server.process.communicate()
    assert server.process.returncode == 70
    assert out == b""
    assert b"disk on fire" in err


@pytest.mark.parametrize("module", ["support.echo_wiring", "retinue_server.workqueue.wiring"])
async def test_a_plain_server_loads_nothing_that_it_does_not_use(tmp_path: Path, module: str) -> None:
    code = """
import gc, sys
from retinue_server import __main__ as entry, command
command.PATTERNS = {"workqueue": "MODULE"}
def announce(*_):
    heavy = {"opentelemetry", "prometheus_client", "uvicorn", "rich", "click", "yaml", "h11", "psycopg", "tempfile"}
    heavy |= {"google.protobuf.json_format", "grpc_reflection.v1alpha.reflection", "importlib.resources", "difflib"}
    heavy |= {"dataclasses", "google.rpc", "hashlib", "hmac", "json", "random", "shutil", "bz2", "lzma"}
    loaded = sorted(name for name in sys.modules if {name, name.partition(".")[0]} & heavy)
    print(loaded, len(sys.modules) // 330, gc.isenabled(), flush=True)
command.announce = announce
sys.exit(entry.main())
""".replace("MODULE", module)
    addresses = [f"--{name}=127.0.0.1:0" for name in ("listen", "probe", "metrics")]
    async with command(tmp_path, "workqueue", *addresses, code=code) as server:
        assert await server.line() == "[] 0 True\n"
        server.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(server.process.wait(), 60) == 0


async def test_help_and_version_teach_without_starting(tmp_path: Path) -> None:
    async with command(tmp_path, "--help") as server:
        out, _ = await server.process.communicate()
    assert server.process.returncode == 0
    for text in ("--upstream", "127.0.0.1:7070", "RETINUE_", "examples:"):
        assert text in out.decode()
    async with command(tmp_path, "--version") as server:
        assert (await server.line()).startswith("retinue-server ")
