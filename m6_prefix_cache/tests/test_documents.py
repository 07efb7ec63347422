"""This milestone's documents are true: every number, every named piece of code, both languages."""
from __future__ import annotations

from pathlib import Path

import m6_prefix_cache
from m0_basics.tools.testing.documents import DocumentConformance
from m6_prefix_cache.tools.facts import FACTS


class TestDocuments(DocumentConformance):
    folder, facts = Path(m6_prefix_cache.__file__).parent, FACTS
