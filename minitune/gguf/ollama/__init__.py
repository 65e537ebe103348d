"""Modelfiles for Ollama, with chat templates in Go's language."""
