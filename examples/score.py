"""Say how likely a model finds a text: the log probability of each token, and the perplexity.

python examples/score.py [model.q35c]
"""

import sys

import numpy as np

import q35c
from q35c.demo import demo_artifact

TEXT = "The LORD is my shepherd; I shall not want."

path = sys.argv[1] if len(sys.argv) > 1 else demo_artifact()[0]
with q35c.load(path) as model:
    ids = np.array(model.tokenizer.encode(TEXT))
    logits = model.score(ids).astype(np.float64)  # [S, V]: row i predicts token i + 1
    logits -= logits.max(axis=1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = log_probabilities[np.arange(len(ids) - 1), ids[1:]]
    for token, value in zip(ids[1:], found, strict=True):
        print(f"{value:8.3f}  {model.tokenizer.decode([token])!r}")
    print(f"perplexity {np.exp(-found.mean()):.2f} over {len(found)} tokens")
