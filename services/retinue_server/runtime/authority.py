"""Who a caller is: the role of the listener that was dialled, raised by a bearer token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from retinue_server.runtime.errors import PermissionDenied, Reason, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from retinue_server.runtime.dispatch import Role
    from retinue_server.runtime.tokens import TokenFile


class Authority:
    """The role of each call on one listener."""

    def __init__(self, role: Role, tokens: TokenFile | None = None, *, required: bool = False) -> None:
        self._role = role
        self._tokens = tokens
        self._required = required

    def role(self, metadata: Mapping[str, str]) -> Role:
        """Raises Unauthenticated for a wrong token, and for none where one is required.

        Without a token file, tokens mean nothing here and are not looked at.
        """
        if self._tokens is None:
            return self._role
        header = metadata.get("authorization")
        if header is None:
            if self._required:
                raise _unauthenticated("it needs a bearer token in the authorization metadata")
            return self._role
        scheme, _, token = header.partition(" ")
        known = self._tokens.role(token.strip()) if scheme.lower() == "bearer" else None
        if known is None:
            raise _unauthenticated("the bearer token is not one of this server's")
        return max(known, self._role)


def check_role(role: Role, needed: Role, path: str) -> None:
    """Raises PermissionDenied when the caller's role does not include the needed one."""
    if role < needed:
        raise PermissionDenied(
            f"cannot call {path}: it needs the role {needed.name.lower()}; "
            "dial the control socket or send a token that has it",
            reason=Reason.ROLE_REQUIRED,
            required=needed.name.lower(),
            role=role.name.lower(),
        )


def _unauthenticated(why: str) -> Unauthenticated:
    return Unauthenticated(f"cannot admit the call: {why}", reason=Reason.UNAUTHENTICATED)
