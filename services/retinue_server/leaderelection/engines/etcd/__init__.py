"""etcd: elections among all servers that share a cluster, decided by the order in which keys were made.

Which versions are safe, and what breaks the tokens, stands in deploy/leaderelection. etcd's own Election service is not
used: its waiters do not look whether their own key is still there.

Leases. One etcd lease per server and length of lease, whatever number of elections: a renewal is one keep-alive, which
costs the cluster no write, and reads that tell what became of each term. While sessions stand in line the engine keeps
their lease alive itself. A lease that etcd has lost takes everything held under it along; the next claim makes another.

A claim puts a key into the election's line, attached to the lease; the oldest key of the line leads. Its term begins
with a transaction that holds only if that key is still there and the record is what was read. A claim is granted only
on a reading that shows key and record, with a keep-alive that the claim itself sent. Nobody can come in front of a key
that is first, since create revisions only rise; a key that is there has a lease that is alive.

The token is the create revision of the leader's key. A key that vanished without the record saying so is a term that
ran out: the next leader is told the release delay that it asked for.

One watch tells each server of everything under the prefix, its predecessors and its own keys among it. What it tells
are hints: nothing is believed but a reading.
"""
