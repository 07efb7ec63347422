"""This milestone's documents are true: every number, every named piece of code, both languages."""
from __future__ import annotations

from pathlib import Path

import m3_paged_kv
from m0_basics.tools.testing.documents import DocumentConformance
from m3_paged_kv.tools.facts import FACTS


class TestDocuments(DocumentConformance):
    folder, facts = Path(m3_paged_kv.__file__).parent, FACTS
