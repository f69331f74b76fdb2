"""The sampler: prompts, the decoding loop, key-value caches, logits processors."""
