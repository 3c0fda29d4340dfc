"""The Kimi Linear model: configuration, weights, layers, request state, sampling, tokenizer."""
