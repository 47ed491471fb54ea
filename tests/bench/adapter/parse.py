"""prometheus_client's parser alone: for each line of its input, reads all apps' pages so often and tells its CPU."""

from __future__ import annotations

import json
import sys
import time

from prometheus_client.parser import text_string_to_metric_families

from bench.adapter.apps import VERSIONS, page


def main() -> None:
    """`parse.py APPS`."""
    apps = int(sys.argv[1])
    pages = [[page(app, version) for app in range(apps)] for version in range(VERSIONS)]
    print("{}", flush=True)
    for line in sys.stdin:
        began = time.process_time()
        for number in range(json.loads(line)["times"]):
            for text in pages[number % VERSIONS]:
                list(text_string_to_metric_families(text.decode()))
        print(json.dumps({"cpu_s": time.process_time() - began}), flush=True)


if __name__ == "__main__":
    main()
