"""Real data of seven tasks, where they lie beside the checkout; they are not part of it."""

from pathlib import Path

import pytest

EVALDATA = Path(__file__).resolve().parents[2] / "shared" / "evaldata"
needs_evaldata = pytest.mark.skipif(not EVALDATA.is_dir(), reason="the real data are not here")
