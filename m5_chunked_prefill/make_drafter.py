"""Which drafter an engine's options ask for."""
from __future__ import annotations

from collections.abc import Sequence

from m0_basics.config import ConfigError
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.model_spec import ModelSpec
from m2_continuous_batching.plugins import CachePlugin

from .config import EngineConfig
from .draft_model import make_draft_model
from .drafter import Drafter
from .lookup_drafters import NGramDrafter, SuffixDrafter


def drafter_for(config: EngineConfig, spec: ModelSpec, tokenizer: Tokenizer | None,
                cache_plugins: Sequence[CachePlugin], num_cached_tokens: int) -> Drafter | None:
    """The drafter of `config.speculative_config`; None where nobody guesses. Raises ConfigError for what cannot be.

    `num_cached_tokens`: how many the target's cache holds; a draft model's holds no more.
    """
    method = config.speculative_config.speculative_method
    if method == "none":
        return None
    if cache_plugins:
        names = ", ".join(type(plugin).__name__ for plugin in cache_plugins)
        raise ConfigError(f"speculative_method={method} takes back what was stored for a wrong guess, and {names} may "
                          "have kept something of it; allowed: speculative_method=none, or no cache plugin")
    if method == "ngram":
        return NGramDrafter()
    if method == "suffix":
        return SuffixDrafter()
    return make_draft_model(config, spec, tokenizer, num_cached_tokens)
