"""Continue several prompts at once: up to `batch` of them share every decode step.

python examples/batch.py [model.q35c]
"""

import sys

import q35c
from q35c.demo import demo_artifact

PROMPTS = [
    "And the king said",
    "In those days",
    "The sea was",
    "And it came to pass",
    "He answered",
]

path = sys.argv[1] if len(sys.argv) > 1 else demo_artifact()[0]
with q35c.load(path) as model:
    # A row's text does not depend on its neighbours; prompts beyond the batch wait for a free row.
    texts = model.generate(PROMPTS, max_new_tokens=24, seed=1)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        print(f"{prompt}{text}")
        print(f"  [{text.finish_reason}, {text.timings.new_tokens} tokens]")
