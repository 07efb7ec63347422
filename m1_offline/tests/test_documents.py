"""This milestone's documents are true: every number, every named piece of code, both languages."""
from __future__ import annotations

from pathlib import Path

import m1_offline
from m0_basics.tools.testing.documents import DocumentConformance
from m1_offline.tools.facts import FACTS


class TestDocuments(DocumentConformance):
    folder, facts = Path(m1_offline.__file__).parent, FACTS
