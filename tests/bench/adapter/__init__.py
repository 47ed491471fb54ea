"""The benchmark of the adapter: what a collected series costs, and what readers notice of collections.

How it is measured
------------------

The server and its worker process share core 0, so that what is said of one core is so; apps, scrapers, watchers and
the sender of StatsD are on core 1. Five apps show 2,000 lines each (`apps.py`): counters and gauges with two or three
labels, and histograms, 140 KiB a page. Every value differs from one page to the next, which is more than apps do. All
are collected once a second, as often as the contract lets.

A scrape is timed by who asks, from the connection to the last byte of 1.6 MB, at random times or ten times a second;
each answer must have every line of every app. `the same bytes from memory` is a server that does nothing else, on the
same core, asked between scrapes of ours: what it takes is the machine's. CPU is what the kernel counts for all threads
of the server and its worker. `prometheus_client` is its parser alone over the same pages, in a process on the same core
with Python's usual garbage collection, in the same seconds.

What StatsD takes of a core is lines by CPU, of server and worker, while more comes than can be taken: on a machine that
others use, too, the core is not ours alone. The sender (`statsd.c`) sends datagrams of so many lines, counters, gauges
and timers with tags, as fast as it can or at a pace. Datagrams received and dropped are what the target's status says;
besides, the counters on `/metrics` must have grown by what the received datagrams say, or the cell is void.

Hung apps take connections and never answer. Watchers are streams of one Python process; what they cost is the
difference of CPU with and without them, in turns.
"""
