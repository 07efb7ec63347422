"""This milestone's documents are true: every number, every named piece of code, both languages."""
from __future__ import annotations

from pathlib import Path

import m4_flash_attn
from m0_basics.tools.testing.documents import DocumentConformance
from m4_flash_attn.tools.facts import FACTS


class TestDocuments(DocumentConformance):
    folder, facts = Path(m4_flash_attn.__file__).parent, FACTS
