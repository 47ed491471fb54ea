"""An app that leads until it is killed: python -m bench.elections.app ADDRESS ELECTION PROOF_DIR APP_LEASE."""

from __future__ import annotations

import asyncio
import sys

from retinue.client.election import campaign


async def main(address: str, election_id: str, proof_dir: str, app_lease: str) -> None:
    async with campaign(election_id, address=address, proof_dir=proof_dir or False, app_lease=float(app_lease)):
        print("elected", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
