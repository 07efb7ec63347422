"""Which drafter an engine's options ask for."""
from __future__ import annotations

from collections.abc import Sequence

from m0_basics.config import ConfigError
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.model_spec import ModelSpec
from m1_offline.sampler import FullSampler
from m2_continuous_batching.plugins import CachePlugin

from .config import EngineConfig
from .draft_model import DraftModel
from .drafter import Drafter
from .lookup_drafters import NGramDrafter, SuffixDrafter


def load_draft(config: EngineConfig, spec: ModelSpec, tokenizer: Tokenizer | None,
               cache_plugins: Sequence[CachePlugin]) -> DraftModel | None:
    """The draft model, where one is asked for: loaded before the target's cache is, which gets what is left.

    Raises ConfigError for what cannot be.
    """
    method = config.speculative_config.speculative_method
    if method != "none" and cache_plugins:
        names = ", ".join(type(plugin).__name__ for plugin in cache_plugins)
        raise ConfigError(f"speculative_method={method} takes back what was stored for a wrong guess, and {names} may "
                          "have kept something of it; allowed: speculative_method=none, or no cache plugin")
    return DraftModel(config, spec, tokenizer) if method == "draft_model" else None


def drafter_for(config: EngineConfig, draft: DraftModel | None, tokenizer: Tokenizer | None,
                num_blocks: int) -> Drafter | None:
    """The drafter of `config.speculative_config`; None where nobody guesses. A `draft` model gets that many blocks."""
    if draft is not None:
        return draft.with_cache(num_blocks, FullSampler(tokenizer))
    drafters: dict[str, type[Drafter]] = {"ngram": NGramDrafter, "suffix": SuffixDrafter}
    method = config.speculative_config.speculative_method
    return drafters[method]() if method in drafters else None
