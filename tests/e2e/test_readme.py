"""What the README shows in Python is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from servers import environment, start_server

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_python_program_of_the_readme_prints_its_result(tmp_path: Path) -> None:
    [program] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    server = start_server(tmp_path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment(RETINUE_ADDRESS=server.address),
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    finally:
        assert server.stop() == 0
    assert done.stdout == "MAKE IT LOUD\n", done.stderr
