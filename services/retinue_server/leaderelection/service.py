"""LeaderElectionService: translate in, call the core, translate out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from retinue.leaderelection.v1 import leaderelection_service_pb2 as api
from retinue_server import __version__
from retinue_server.leaderelection import translate
from retinue_server.leaderelection.campaign import Campaign
from retinue_server.leaderelection.core import limits
from retinue_server.runtime import wire
from retinue_server.runtime.dispatch import Role, Shown

if TYPE_CHECKING:
    from retinue_server.leaderelection.core.elections import Elections
    from retinue_server.leaderelection.proof import Proofs
    from retinue_server.runtime.dispatch import Call

DESCRIPTOR = api.DESCRIPTOR.services_by_name["LeaderElectionService"]
ROLES = {"RequestStepDown": Role.OPERATOR}

_ELECTIONS: wire.PageTokens[str] = wire.PageTokens("elections", 1, str)
_TERMS: wire.PageTokens[tuple[str, wire.Int64]] = wire.PageTokens("terms", 1, tuple[str, wire.Int64])


class Defaults(NamedTuple):
    """What those get who ask for no lease."""

    lease_ms: int
    app_lease_ms: int


class LeaderElectionService:
    """For candidates and those who look on; see the contract."""

    def __init__(self, elections: Elections, defaults: Defaults, proofs: Proofs) -> None:
        self._elections, self._defaults, self._proofs = elections, defaults, proofs

    def _reader(self) -> translate.Reader:
        return translate.Reader(*self._defaults)

    async def Campaign(self, call: Call) -> None:
        await Campaign(self._elections, self._reader(), self._proofs, call).run()

    async def TryAcquire(self, request: api.TryAcquireRequest, call: Call) -> api.TryAcquireResponse:
        read = self._reader()
        asked = read.acquire(request)
        leadership, view = await self._elections.try_acquire(asked, read.violations)
        if leadership is None:
            return api.TryAcquireResponse(leader=translate.leader(view))
        return api.TryAcquireResponse(acquired=True, leadership=translate.leadership(leadership))

    async def Renew(self, request: api.RenewRequest, call: Call) -> api.RenewResponse:
        read = self._reader()
        leadership, step_down = self._elections.renew(request.session_id, read.token(request), read.violations)
        return api.RenewResponse(leadership=translate.leadership(leadership), step_down_requested=step_down)

    async def Proclaim(self, request: api.ProclaimRequest, call: Call) -> api.ProclaimResponse:
        read = self._reader()
        token = read.token(request)
        view = await self._elections.proclaim(request.session_id, token, request.value, read.violations)
        return api.ProclaimResponse(leader=translate.leader(view))

    async def Resign(self, request: api.ResignRequest, call: Call) -> api.ResignResponse:
        read = self._reader()
        released = await self._elections.resign(request.session_id, read.token(request), read.violations)
        return api.ResignResponse(released=released)

    async def GetLeader(self, request: api.GetLeaderRequest, call: Call) -> api.GetLeaderResponse:
        view = await self._elections.leader(request.election_id, cached=request.cached)
        return api.GetLeaderResponse(leader=translate.leader(view))

    async def Observe(self, request: api.ObserveRequest, call: Call) -> None:
        async for view in self._elections.observe(request.election_id):
            await call.write(api.ObserveResponse(leader=translate.leader(view)))

    async def VerifyToken(self, request: api.VerifyTokenRequest, call: Call) -> api.VerifyTokenResponse:
        read = self._reader()
        view = await self._elections.verify(request.election_id, read.token(request), read.violations)
        return api.VerifyTokenResponse(leader=translate.leader(view))

    async def RequestStepDown(self, request: api.RequestStepDownRequest, call: Call) -> api.RequestStepDownResponse:
        read = self._reader()
        token = read.token(request)
        requested, view = await self._elections.ask_step_down(request.election_id, token, read.violations)
        return api.RequestStepDownResponse(requested=requested, leader=translate.leader(view))

    async def ListElections(self, request: api.ListElectionsRequest, call: Call) -> api.ListElectionsResponse:
        read = self._reader()
        after = read.page(_ELECTIONS, request.page_token) or ""
        found, more = await self._elections.page(after, request.page_size, read.violations)
        return api.ListElectionsResponse(
            leaders=[translate.leader(view) for view in found],
            next_page_token=_ELECTIONS.encode(found[-1].election_id) if more else "",
        )

    async def ListTerms(self, request: api.ListTermsRequest, call: Call) -> api.ListTermsResponse:
        read = self._reader()
        before = read.page(_TERMS, request.page_token)
        if before is not None and before[0] != request.election_id:
            raise wire.page_token_expired("it belongs to another election")
        position = before[1] if before else None
        found, more = await self._elections.terms(request.election_id, position, request.page_size, read.violations)
        return api.ListTermsResponse(
            terms=[translate.term(term) for term in found],
            next_page_token=_TERMS.encode((request.election_id, found[-1].epoch)) if more else "",
        )

    def page(self, election_id: str) -> Shown | None:
        """Whether an app of this server leads, at this moment, by what is known here; None for no election of it."""
        view = self._elections.seen(election_id)
        if view is None:
            return None
        return Shown(self._elections.leads_here(election_id), translate.leader(view))

    async def GetCapabilities(self, request: api.GetCapabilitiesRequest, call: Call) -> api.GetCapabilitiesResponse:
        can = self._elections.engine.capabilities
        return api.GetCapabilitiesResponse(
            server_version=__version__,
            engine=can.engine,
            scope=api.ElectionScope.ValueType(can.scope),
            min_lease_duration=wire.to_duration(max(can.min_lease_ms, limits.MIN_LEASE_MS)),
            proof_directory=str(self._proofs.directory),
        )
