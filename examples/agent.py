"""Let a model use tools: ask, carry out its calls, tell it the results, until it answers in words.

q35c serve model.q35c                                 (in another terminal)
python examples/agent.py [http://127.0.0.1:8080]
"""

import json
import sys
import urllib.request

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    }
]
MOST_STEPS = 5


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def carry_out(name, arguments):
    """Run a call. What a model asks for is data from outside: a wrong call gets an answer that says so."""
    try:
        if name == "add":
            return str(arguments["a"] + arguments["b"])
        return f"there is no tool {name}"
    except (KeyError, TypeError) as error:
        return f"wrong arguments: {error!r}"


model = ask("/v1/models")["data"][0]["id"]
messages = [{"role": "user", "content": "What is 17.5 + 24.5? Use the tool."}]
for _ in range(MOST_STEPS):
    body = {"model": model, "messages": messages, "tools": TOOLS, "max_tokens": 500, "seed": 1}
    message = ask("/v1/chat/completions", body)["choices"][0]["message"]
    messages.append(message)  # with its reasoning, which the template keeps while tools are in use
    calls = message.get("tool_calls", [])
    for call in calls:
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        result = carry_out(name, arguments)
        print(f"{name}({arguments}) = {result}")
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    if not calls:
        print(message["content"])
        break
