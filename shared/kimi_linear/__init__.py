"""The Kimi Linear model: configuration, weights, layers, forward, request state, sampling, tokenizer."""
