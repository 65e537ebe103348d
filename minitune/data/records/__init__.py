"""Records of every shape become conversations, texts with spans, or tokens."""
