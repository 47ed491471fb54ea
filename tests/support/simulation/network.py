"""Calls between the nodes of a simulated world, over a network that delays, loses, doubles and cuts.

A call is a request and a reply, as unary gRPC. Its request may come twice (a proxy that retries), late, or never; the
reply may be lost while the server believes it sent; a caller that gives up is told to the server later, or never
(half-open). A dead server's callers are cut off, or hear nothing.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any, Protocol

from support.simulation.chance import Chance
from support.simulation.loop import Node, SimulatedLoop
from support.simulation.records import Answered, Arrived, Called, GaveUp, History, HungUp, Noted, Received

RESET_S = 0.05
"""How long a reset takes to be noticed at most."""


class Cut(Exception):
    """The connection broke, or there was none; the call may have taken effect."""


class TimedOut(Exception):
    """The caller's deadline came first; the call may have taken effect."""


@dataclass(frozen=True)
class Weather:
    """How bad the network is: probabilities a message, delays in seconds."""

    delay: tuple[float, float] = (0.0002, 0.002)
    slow: float = 0.0
    slow_delay: tuple[float, float] = (0.2, 3.0)
    lose_request: float = 0.0
    lose_reply: float = 0.0
    duplicate: float = 0.0
    half_open: float = 0.0
    """That a broken connection is not noticed by the other side."""


CALM = Weather()


class Service(Protocol):
    """What is called."""

    node: Node

    async def serve(self, verb: str, args: tuple[Any, ...]) -> Any:
        """The answer; raises the errors that `failures` names."""


@dataclass
class _Call:
    number: int
    node: Node
    verb: str
    args: tuple[Any, ...]
    reply: asyncio.Future[Any]
    served: list[tuple[Node, asyncio.Task[None]]] = field(default_factory=list)
    over: bool = False


class Network:
    """Between all clients and one service; `failures`: what the service raises on purpose."""

    def __init__(
        self, loop: SimulatedLoop, chance: Chance, history: History, failures: type[Exception], weather: Weather
    ) -> None:
        self._loop, self._chance, self._history, self._failures = loop, chance, history, failures
        self.weather = weather
        self._service: Service | None = None
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self.deaf: set[str] = set()
        """Nodes that no reply reaches."""
        self.mute: set[str] = set()
        """Nodes whose requests don't get through."""

    def host(self, service: Service | None) -> None:
        """From now on calls reach this service; with None they are refused."""
        self._service = service

    @property
    def busy(self) -> bool:
        """Whether a server works on something."""
        return any(not task.done() for call in self._calls.values() for node, task in call.served if not node.dead)

    async def call(self, node: Node, verb: str, args: tuple[Any, ...], timeout_s: float) -> Any:
        """The answer; raises Cut, TimedOut, or what the service raised."""
        call = _Call(next(self._numbers), node, verb, args, self._loop.create_future())
        self._calls[call.number] = call
        self._history.add(Called(self._loop.time(), call.number, node.name, verb, args))
        self._send(call)
        timer = self._loop.call_later(timeout_s, _settle, call, TimedOut("deadline"))
        try:
            answer = await call.reply
        finally:
            timer.cancel()
            self._end(call)
        if isinstance(answer, (Cut, TimedOut)):
            self._history.add(GaveUp(self._loop.time(), call.number, node.name, str(answer)))
            raise answer
        self._history.add(Received(self._loop.time(), call.number, node.name, answer))
        if isinstance(answer, Exception):
            raise answer
        return answer

    # The way there

    def _send(self, call: _Call) -> None:
        if self._chance.happens(self.weather.duplicate):
            self._loop.outside(self._delay() + self._delay(), self._arrive, call)
        if call.node.name in self.mute or self._chance.happens(self.weather.lose_request):
            self._history.add(Noted(self._loop.time(), "network", f"lost the request of call {call.number}"))
        else:
            self._loop.outside(self._delay(), self._arrive, call)

    def _delay(self) -> float:
        slow = self._chance.happens(self.weather.slow)
        return self._chance.between(*(self.weather.slow_delay if slow else self.weather.delay))

    def _arrive(self, call: _Call) -> None:
        service = self._service
        if service is None:
            self._cut(call, "refused")
            return
        task = service.node.spawn(self._serve(service, call))
        call.served.append((service.node, task))

    async def _serve(self, service: Service, call: _Call) -> None:
        arrived = Arrived(self._loop.time(), call.number, service.node.name, call.verb, call.args)
        self._history.add(arrived)
        try:
            answer = await service.serve(call.verb, call.args)
        except self._failures as error:
            answer = error
        self._history.add(Answered(self._loop.time(), *arrived[1:], answer))
        self._reply(call, answer)

    # The way back

    def _reply(self, call: _Call, answer: Any) -> None:
        if call.over:
            return
        if call.node.name in self.deaf or self._chance.happens(self.weather.lose_reply):
            self._history.add(Noted(self._loop.time(), "network", f"lost the reply of call {call.number}"))
            return
        self._loop.outside(self._delay(), _settle, call, answer)

    def _cut(self, call: _Call, why: str) -> None:
        self._loop.outside(self._chance.between(0, RESET_S), _settle, call, Cut(why))

    # Ends

    def _end(self, call: _Call) -> None:
        """The caller is gone: what still works for it is told."""
        call.over = True
        self._calls.pop(call.number, None)
        for node, task in call.served:
            if not task.done() and not self._chance.happens(self.weather.half_open):
                self._loop.outside(self._delay(), self._hang_up, call, node, task)

    def _hang_up(self, call: _Call, node: Node, task: asyncio.Task[None]) -> None:
        if not node.dead and not task.done():
            self._history.add(HungUp(self._loop.time(), call.number, node.name))
            task.cancel()

    def reset_client(self, node: Node) -> None:
        """A client died: its calls end."""
        for call in [call for call in self._calls.values() if call.node is node]:
            self._end(call)

    def reset_server(self, node: Node) -> None:
        """A server died: who waited for it is cut off, or hears nothing."""
        for call in self._calls.values():
            if any(served is node for served, _ in call.served) and not self._chance.happens(self.weather.half_open):
                self._cut(call, "reset")


def _settle(call: _Call, answer: Any) -> None:
    if not call.reply.done():
        call.reply.set_result(answer)
