"""Layouts: where bytes lie, each once and by name. What is stored is for `formats/` to say."""
