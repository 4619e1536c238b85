"""The Node SDKs: tests/node/clients.test.mjs by Node's own test runner."""

import os
import shutil
import subprocess

import pytest
from conftest import MODEL, ROOT

NODE = ROOT / "tests" / "node"


def test_node(url: str) -> None:
    if shutil.which("node") is None or not (NODE / "node_modules").is_dir():
        pytest.skip("Node and its packages are not there: make clients installs them where npm is")
    ran = subprocess.run(
        ["node", "--test", "clients.test.mjs"],
        cwd=NODE,
        env=os.environ | {"LMX_URL": url, "LMX_MODEL": MODEL},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
