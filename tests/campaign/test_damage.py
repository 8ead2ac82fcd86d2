"""The campaigns' own judgement: each way damages a file, each end gets its verdict."""

import random
import sys

import pytest

from tests.campaign import damage
from tests.campaign.damage import Ended, Verdict, Way


@pytest.mark.parametrize("way", list(Way))
def test_each_way_changes_a_file_and_tells_it(tmp_path, way):
    path, other = tmp_path / "a", tmp_path / "b"
    content = bytes(range(1, 256))
    path.write_bytes(content)
    other.write_bytes(b"other")
    told = damage.damage(path, way, random.Random(0), other)
    assert told.startswith(f"a: {way}")
    assert path.exists() == (way != Way.DELETE)
    assert not path.exists() or path.read_bytes() != content
    assert other.read_bytes() == b"other"


@pytest.mark.parametrize(
    "ended, same, verdict",
    [
        (Ended(0, "done\n", "", 1.0), True, Verdict.SAME),
        (Ended(0, "done\n", "", 1.0), False, Verdict.WRONG),
        (Ended(2, "", "x is damaged\n", 1.0), False, Verdict.REFUSED),
        (Ended(1, "", "", 1.0), False, Verdict.UGLY),
        (Ended(1, "", "Traceback (most recent call last):\n...\n", 1.0), False, Verdict.UGLY),
        (Ended(-6, "aborted\n", "", 1.0), False, Verdict.UGLY),
        (Ended(-9, "step 3\n", "", 99.0, hung=True), False, Verdict.HUNG),
    ],
)
def test_each_end_gets_its_verdict(ended, same, verdict, capsys):
    trial = damage.judge("a: bit flipped", "flips", ended, lambda: same)
    assert trial.verdict == verdict
    assert damage.report([trial]) == (0 if verdict in damage.GOOD else 1)
    assert "1 trials" in capsys.readouterr().out


@pytest.mark.slow
def test_a_program_that_waits_for_ever_is_ended_and_one_that_works_is_not(monkeypatch):
    monkeypatch.setattr(damage, "HANG_SECONDS", 1.0)
    waits = [sys.executable, "-c", "import time; print('waiting', flush=True); time.sleep(600)"]
    ended = damage.run(waits)
    assert (ended.hung, ended.stdout) == (True, "waiting\n")
    works = "import time\nwhile time.process_time() < 1.5: pass\nprint('done')"
    ended = damage.run([sys.executable, "-c", works])
    assert (ended.hung, ended.code, ended.stdout) == (False, 0, "done\n")
