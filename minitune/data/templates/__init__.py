"""Chat templates: rendering, and the spans that the assistant wrote."""
