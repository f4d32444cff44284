"""docs/scaling.md has the tables that docs/scaling.py writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from longspan import BackendUnavailable

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_has_todays_predictions(tmp_path: Path) -> None:
    sys.path.insert(0, str(DOCS))
    try:
        import scaling
    finally:
        sys.path.remove(str(DOCS))
    try:
        costs = scaling.predictions(tmp_path)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    text = scaling.PAGE.read_text()
    assert scaling.page(text, costs) == text, "run: python docs/scaling.py"
