"""From a name to weights and a tokenizer."""
