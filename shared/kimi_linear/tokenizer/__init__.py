"""Text to token ids and back, in the formats that model directories carry. Knows no torch."""
