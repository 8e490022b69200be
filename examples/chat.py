"""Talk to a model: what a turn shares with the one before is not computed again.

python examples/chat.py [model.q35c]        (an empty line ends it)
"""

import sys

import q35c
from q35c.demo import demo_artifact
from q35c.runtime.chat.answer import ContentDelta

path = sys.argv[1] if len(sys.argv) > 1 else demo_artifact()[0]
with q35c.load(path) as model, q35c.Conversation(model) as conversation:
    messages = []
    while text := input("> "):
        messages.append({"role": "user", "content": text})
        stream = conversation.answer(messages, max_new_tokens=64, seed=1)
        for part in stream:
            if isinstance(part, ContentDelta):  # reasoning and tool calls are parts of their own
                print(part.text, end="", flush=True)
        print()
        messages.append(stream.result.message)
