"""Reach XLA's own parser of HLO text, a judge that shares no code with the package's."""

from __future__ import annotations

import importlib
from typing import Any

# A part of jaxlib without type stubs.
hlo: Any = importlib.import_module("jaxlib._hlo")
