"""What the README shows in Python is run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from servers import environment, start_server

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("readme", "result"), [("README.md", "MAKE IT LOUD\n"), ("clients/README.md", "leading under token 1\n")]
)
def test_the_python_program_of_a_readme_prints_its_result(tmp_path: Path, readme: str, result: str) -> None:
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(), re.DOTALL)
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
    assert done.stdout == result, done.stderr
