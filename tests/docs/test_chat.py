"""The Python of docs/chat.md runs, block by block, on a model that answers at random."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.chatting import THINKING_TEMPLATE, write_chat
from tests.fake_artifact import GENERATION

PAGE = Path(__file__).parents[2] / "docs" / "chat.md"


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = {**GENERATION, "do_sample": True, "stop_ids": []}
    template = "x" * 70 + THINKING_TEMPLATE  # a beginning that turns share
    write_chat(
        tmp_path / "model.q35c", template=template, noise=8.0, generation=generation, context=1024
    )
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    said = capsys.readouterr().out
    assert len(re.findall(r"\d+ tokens of the prompt were there already", said)) == 2
    assert re.search(r"[1-9]\d* tokens of the prompt were there already", said)
    names["model"].close()  # type: ignore[attr-defined]
