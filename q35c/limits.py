"""The most bytes of what an artifact holds for text: the compiler takes in no more than the runtime will."""

MAX_TOKENIZER_BYTES = 64 << 20
MAX_TOKENIZER_CONFIG_BYTES = 4 << 20
MAX_TEMPLATE_BYTES = 64 << 10  # published ones have 5 to 20 KB
