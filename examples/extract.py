"""Make data of text: the answer must fit a JSON schema, whatever the model would rather say.

q35c serve model.q35c                                           (in another terminal)
python examples/extract.py [http://127.0.0.1:8080]
"""

import json
import sys
import urllib.request

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
TEXT = "Ada Lovelace, 36, of London, wrote the first program in 1843."
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["person", "place", "thing"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


body = {
    "model": ask("/v1/models")["data"][0]["id"],
    "messages": [{"role": "user", "content": f"Who is meant? {TEXT}"}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "entry", "schema": SCHEMA}},
    "chat_template_kwargs": {"enable_thinking": False},
    "max_tokens": 200,
    "seed": 1,
}
choice = ask("/v1/chat/completions", body)["choices"][0]
if choice["finish_reason"] == "length":
    raise SystemExit("the answer was cut off: raise max_tokens")
entry = json.loads(choice["message"]["content"])
print(f"{entry['name']}: a {entry['kind']} of {entry['age']} years")
