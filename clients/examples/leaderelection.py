"""An election from end to end; prints clients/transcripts/leaderelection.txt.

It wants RETINUE_CONTROL_ADDRESS, the server's control socket, unless `make run` has put one above the working
directory. Give an election of your own to run it twice.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from retinue.client import RetinueError
from retinue.client.address import control_address
from retinue.client.election import Election, ElectionEvent, Term, TermLost
from retinue.leaderelection.v1 import election_pb2 as pb
from retinue.leaderelection.v1 import leaderelection_service_pb2 as api

if TYPE_CHECKING:
    from collections.abc import Awaitable

APP_LEASE = 2.0
"""In seconds."""


async def main(name: str) -> None:
    heard: list[ElectionEvent] = []
    async with Election(name, candidate_id="first", app_lease=APP_LEASE, listener=heard.append) as first:
        print(f"before the first term: {shown(await first.leader())}")
        await refuse(first)
        async with first.campaign() as term:
            print(f"first is elected: {yes(term.is_leader())}, its token is above 0: {yes(term.token.value > 0)}")
            second = await stand_by(name)
            await third(first)
            await keep(term)
            await proclaim(first, term)
        # The block has ended, and so first has resigned.
        print(f"first resigns: released {yes(resigned(heard))}, it leads: {yes(term.is_leader())}")
        await hand_over(first, term, second)
        print(f"after the last term: {shown(await first.leader())}")
        async for past in first.terms():
            reason = pb.EndReason.Name(past.end_reason).removeprefix("END_REASON_")
            print(f"a term of {past.candidate_id} ended: {reason}")


async def refuse(election: Election) -> None:
    nonsense = api.TryAcquireRequest(election_id="no spaces, please", app_lease_duration=Duration(seconds=3600))
    refusal = await refused(election.call("TryAcquire", nonsense))
    print(f"stood with nonsense: {told(refusal)}")
    for field in sorted(violation.field for violation in refusal.violations):
        print(f"  {field}")
    unknown = pb.FencingToken(domain="nowhere", value=1)
    print(f"verified a token before the first term: {told(await refused(election.verify(unknown)))}")


class Second:
    """Another candidate: it waits, leads, and is asked to step down."""

    def __init__(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        self.leader: asyncio.Future[pb.Leader] = loop.create_future()
        self.term: asyncio.Future[Term] = loop.create_future()
        self.heard: list[ElectionEvent] = []
        self.leads_when_stopped = False
        self._name = name
        self.life = asyncio.create_task(self._live())

    async def _live(self) -> str:
        """Leads until it must stop; why."""
        election = Election(self._name, candidate_id="second", app_lease=APP_LEASE, listener=self._hear)
        try:
            async with election, election.campaign() as term:
                self.term.set_result(term)
                await self._work(term)
        except TermLost as lost:
            return lost.reason
        return "nothing"

    async def _work(self, term: Term) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.leads_when_stopped = term.is_leader()

    def _hear(self, event: ElectionEvent) -> None:
        self.heard.append(event)
        if event.kind == "standby" and event.leader is not None:
            self.leader.set_result(event.leader)


async def stand_by(name: str) -> Second:
    second = Second(name)
    print(f"second stands by: {(await second.leader).candidate_id} leads")
    return second


async def third(election: Election) -> None:
    request = api.TryAcquireRequest(election_id=election.election_id, candidate_id="third")
    answer = await election.call("TryAcquire", request)
    print(f"third tried: acquired {yes(answer.acquired)}, {answer.leader.candidate_id} leads")


async def keep(term: Term) -> None:
    """Waits for longer than the app's lease: heartbeats go on by themselves."""
    await asyncio.sleep(3 * APP_LEASE)
    goes_on = not term.ending.is_set()
    print(f"three leases later first still leads: {yes(term.is_leader())}, its work goes on: {yes(goes_on)}")


async def proclaim(election: Election, term: Term) -> None:
    seen = election.observe()
    print(f"an observer sees: {shown(await anext(seen))}")
    await term.proclaim("10.0.0.1:8080")
    print(f"first proclaims, the observer sees: {shown(await anext(seen))}")
    print(f"first's token is verified: {shown(await election.verify(term.token))}")


async def hand_over(election: Election, first: Term, waiting: Second) -> None:
    second = await waiting.term
    higher, same = second.token.value > first.token.value, second.token.domain == first.token.domain
    print(f"second is elected: a higher token: {yes(higher)}, the same domain: {yes(same)}")
    print(f"first's token is refused: {told(await refused(election.verify(first.token)))}")
    print(f"first proclaims under it: {told(await refused(first.proclaim('too late')))}")
    await step_down(election, second, waiting)


async def step_down(election: Election, second: Term, waiting: Second) -> None:
    print(f"an app asks second to step down: {told(await refused(election.request_step_down(second.token)))}")
    async with Election(election.election_id, address=control_address()) as operator:
        answer = await operator.request_step_down(second.token)
    print(f"an operator asks second to step down: {yes(answer.requested)}")
    reason = await waiting.life
    print(f"second must stop its work: {reason}, it still leads: {yes(waiting.leads_when_stopped)}")
    print(f"second resigns: released {yes(resigned(waiting.heard))}")


async def refused(call: Awaitable[object]) -> RetinueError:
    try:
        await call
    except RetinueError as error:
        return error
    raise AssertionError("it was not refused")


def told(refusal: RetinueError) -> str:
    return f"{refusal.code.name} {refusal.reason}"


def shown(leader: pb.Leader) -> str:
    if not leader.candidate_id:
        return "nobody leads"
    return f"{leader.candidate_id} leads" + (f" at {leader.value}" if leader.value else "")


def resigned(heard: list[ElectionEvent]) -> bool:
    return "resigned" in [event.kind for event in heard]


def yes(value: object) -> str:
    return "true" if value else "false"


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "transcript"))
