"""This milestone's documents are true: every number, every named piece of code, both languages."""
from __future__ import annotations

from pathlib import Path

import m5_chunked_prefill
from m0_basics.tools.testing.documents import DocumentConformance
from m5_chunked_prefill.tools.facts import FACTS


class TestDocuments(DocumentConformance):
    folder, facts = Path(m5_chunked_prefill.__file__).parent, FACTS
