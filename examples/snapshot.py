"""Read a long beginning once, and continue it in several ways.

python examples/snapshot.py [model.q35c]
"""

import sys

import q35c
from q35c.demo import demo_artifact

BEGINNING = (
    "Now it came to pass in the days of the king, that there was a man of the hill country, "
)
ENDINGS = ["and his name was", "who had two sons; and", "a shepherd, and"]

path = sys.argv[1] if len(sys.argv) > 1 else demo_artifact()[0]
with q35c.load(path) as model, model.session(context=512) as session:
    session.prefill(model.tokenizer.encode(BEGINNING))
    saved = session.snapshot()  # a recurrent state has no other way back
    print(f"[{saved.length} tokens in {saved.bytes / 2**20:.1f} MiB]")
    for ending in ENDINGS:
        session.restore(saved)
        text = model.generate(ending, session=session, max_new_tokens=16, seed=1)
        print(f"{BEGINNING}{ending}{text}")
