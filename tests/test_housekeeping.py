"""What a server does about its disk without being asked."""

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from lmx.serving.housekeeping import NOTICE_S, Housekeeping
from lmx.serving.removal import Removals
from tests.api_server import write_model
from tests.models_zoo import managing

DAY_S = 86400


def aged(folder: Path, monkeypatch: pytest.MonkeyPatch, days: int) -> Path:
    """A model that came so many days ago."""
    write_model(folder)
    monkeypatch.setattr("lmx.hub.disk._came", lambda entry: 0.0)
    for path in (*folder.iterdir(), folder):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - days * DAY_S))
    return folder


@pytest.mark.parametrize("days", [30, 0])
def test_what_was_not_used_goes_a_day_after_it_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, days: int
) -> None:
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    write_model(zoo / "ant")
    own, listed = tmp_path / "models" / "me" / "old", zoo / "old-too"
    own.parent.mkdir(parents=True)
    for folder in (own, listed):
        aged(folder, monkeypatch, 100)
    clock = trio.testing.MockClock(rate=1.0)

    async def main() -> None:
        hub = {"models_dir": str(tmp_path / "models"), "cleanup_days": days, "low_disk_bytes": 2**62}
        async with managing(zoo, tmp_path / "data", hub=hub) as models:
            await models.looked.wait()
            keeping = Housekeeping(Removals(models, models.live), models.live)
            await keeping.look()
            assert own.exists()
            clock.jump(NOTICE_S)
            await keeping.look()

    trio.run(main, clock=clock)
    assert own.exists() is (days == 0)
    assert listed.exists()
    assert (zoo / "ant").exists()
    assert caplog.text.count("less than [hub] low_disk_bytes") == 1
    assert caplog.text.count("goes tomorrow") == (days > 0)
