"""This milestone's documents are true: every number, every named piece of code, both languages."""
from __future__ import annotations

from pathlib import Path

import m7_gptq
from m0_basics.tools.testing.documents import DocumentConformance
from m7_gptq.tools.facts import FACTS


class TestDocuments(DocumentConformance):
    folder, facts = Path(m7_gptq.__file__).parent, FACTS
