"""Sample by a rule of your own: logits come out of `prefill` and `decode` as numpy arrays.

python examples/logits.py [model.q35c]
"""

import sys

import numpy as np

import q35c
from q35c.demo import demo_artifact

path = sys.argv[1] if len(sys.argv) > 1 else demo_artifact()[0]
with q35c.load(path) as model, model.session(context=256) as session:
    ids = model.tokenizer.encode("In the beginning")
    used: set[int] = set(ids)
    logits = session.prefill(ids)  # f32 [vocabulary], of the last token
    for _ in range(24):
        best = np.argsort(logits)[::-1]
        token = int(next(token for token in best if token not in used))  # never the same word twice
        used.add(token)
        ids.append(token)
        logits = session.decode(token)
    print(model.tokenizer.decode(ids))
