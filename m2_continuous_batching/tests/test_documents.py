"""This milestone's documents are true: every number, every named piece of code, both languages."""
from __future__ import annotations

from pathlib import Path

import m2_continuous_batching
from m0_basics.tools.testing.documents import DocumentConformance
from m2_continuous_batching.tools.facts import FACTS


class TestDocuments(DocumentConformance):
    folder, facts = Path(m2_continuous_batching.__file__).parent, FACTS
