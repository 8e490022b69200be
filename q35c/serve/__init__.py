"""Serve a model over HTTP: three dialects over one engine. Needs the extra `serve`.

One request type (`request`), one engine thread (`engine`), and writers that turn its events into the
answers that OpenAI's and Anthropic's clients expect.
"""
