"""Formats: what storing does to values. numpy only; where bytes lie is for `layouts/` to say."""
