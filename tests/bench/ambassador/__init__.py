"""The benchmark of the ambassador: what a hop through it costs, and how soon what is declared is served.

How it is measured
------------------

What stands between runs on core 0: the whole of our server with its Envoy, nutcracker, HAProxy, or an Envoy by a file
that somebody wrote. What stands behind and the load generator share core 1. All have one thread for bytes, and all of a
cell play in turns of a second and a half, so that what disturbs the machine disturbs all. CPU is what the kernel counts
for all threads of all processes of a proxy, divided by requests; `direct` is the same load without anybody between.

The load (`go/ambassador/load`) is a closed loop: so many connections, each of which waits for its answer before it
asks again. Every answer is compared, byte by byte, with what it has to be, and a wrong one voids the cell. Values,
pages and echoed messages have 100 bytes; keys are drawn evenly from 100,000. Commands to Redis are
`redis-benchmark`'s, which looks for errors only. Where a proxy takes less than the load and the servers behind, core 1
is the limit and rates tell little: CPU per request is what to trust.

nutcracker hashes by `fnv1a_64`, which is quicker than the MD5 of ours; both place keys by ketama. The plain Envoy is
the same program as ours, with a configuration that says what it must and leaves the rest as it is.

`first_byte` is from the call that declares an upstream, by gRPC over the control socket, to the first byte of an answer
through it. `many` declares one after the other; what is needed once is there before it is measured.
"""
