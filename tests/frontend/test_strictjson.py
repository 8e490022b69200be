"""Strict JSON: what Python's reader accepts silently is refused, with the place named."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q35c import strictjson
from q35c.errors import ArtifactError


def read(data: bytes, limit: int = 1 << 20, **options):
    return strictjson.loads(data, where="file", limit=limit, error=ArtifactError, **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "malformed JSON"),
        (b"{", "malformed JSON"),
        (b'{"a": 1} x', "malformed JSON"),
        (b"[1,]", "malformed JSON"),
        (b"\xef\xbb\xbf{}", "malformed JSON"),
        (b'"\xff"', "not UTF-8"),
        (b'{"a": {"b": 1, "b": 1}}', "at $.a: duplicate key 'b'"),
        (b'[0, {"x": NaN}]', "at $[1].x: NaN is not JSON"),
        (b"[Infinity]", "at $[0]: Infinity is not JSON"),
        (b"-Infinity", "at $: -Infinity is not JSON"),
        (b"[1e999]", "at $[0]: number overflows a double"),
        (b"[9223372036854775808]", "at $[0]: integer does not fit 64 bits"),
        (b'{"n": ' + b"7" * 100_000 + b"}", "at $.n: integer does not fit 64 bits"),
        (b'["\\ud800"]', "at $[0]: string holds a lone surrogate"),
        (b'{"\\udfff": 1}', "at $: key holds a lone surrogate"),
        (b"[" * 33 + b"]" * 33, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" + b"0," * 50_000 + b"0]", "too many values"),
        (b'"' + b"a" * (1 << 20) + b'"', "too large"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[:12].hex(),
)
def test_refuses(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        read(data)
    assert message in str(caught.value)


def test_reads_what_is_good() -> None:
    data = b'{"a": [1, -2.5, true, null, "x\\u00e9\\ud83d\\ude00 [[[\\"{"], "b": {}}'
    assert read(data) == {"a": [1, -2.5, True, None, 'xé😀 [[["{'], "b": {}}
    assert read(b"[" * 32 + b"]" * 32)
    assert read(b"[-9223372036854775808, 9223372036854775807]") == [-(2**63), 2**63 - 1]


def test_brackets_inside_strings_do_not_count() -> None:
    assert read(b'["' + b"[" * 1000 + b'", "\\\\", "' + b"{" * 1000 + b'"]')


def test_the_cap_on_values_can_be_raised() -> None:
    data = b"[" + b"0," * 60_000 + b"0]"
    assert len(read(data, max_values=100_000)) == 60_001


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_canonical_form_reads_back(value) -> None:
    written = strictjson.dumps(value)
    assert read(written) == value
    assert strictjson.dumps(read(written)) == written


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_the_typed_error(data: bytes) -> None:
    with suppress(ArtifactError):
        read(data)
