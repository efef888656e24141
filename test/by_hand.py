"""Which cases of a test are left to `python -m pytest -m by_hand`."""
from collections.abc import Iterable
from typing import Any
import pytest


def by_hand(cases: Iterable, *left: Any) -> list:
  """`cases` for `parametrize`, those that are, or begin with, one of `left` marked."""
  return [pytest.param(*(case if isinstance(case, tuple) else (case,)),
                       marks=[pytest.mark.by_hand] * (case in left or (isinstance(case, tuple) and case[0] in left))) for case in cases]
