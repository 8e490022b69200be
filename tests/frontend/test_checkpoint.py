"""Opening good checkpoints in every form they come in. Bad ones are in `tests/abuse/`."""

from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch

from q35c.errors import CheckpointError, InternalError, OptionError
from q35c.frontend.checkpoint import Checkpoint, open_checkpoint
from q35c.frontend.hf_config import read_hf_config
from q35c.frontend.tensors import expected_tensors
from tests.models import config_document, random_weights, write_checkpoint

SEED = 5


def weights_of(kind: str, dtype: torch.dtype = torch.float32, **overrides) -> dict[str, np.ndarray]:
    config = read_hf_config(config_document(kind, **overrides))
    drawn = random_weights(config, SEED)
    return {name: tensor.to(dtype).float().numpy() for name, tensor in drawn.items()}


def assert_holds(checkpoint: Checkpoint, weights: dict[str, np.ndarray]) -> None:
    assert set(checkpoint.names) == set(weights)
    for name, expected in weights.items():
        assert checkpoint.shape(name) == expected.shape
        read = checkpoint.read(name)
        assert read.dtype == np.float32 and read.flags.c_contiguous
        np.testing.assert_array_equal(read, expected, err_msg=name)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"shards": 4},
        {"layout": "multimodal"},
        {"layout": "multimodal", "shards": 3, "dtype": torch.bfloat16},
        {"is_split": True},
        {"is_split": True, "shards": 3, "layout": "multimodal"},
    ],
    ids=lambda form: "-".join(map(str, form.values())) or "plain",
)
def test_every_form_reads_the_same(tmp_path: Path, kind: str, form: dict) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", kind, SEED, **form))
    assert checkpoint.config == read_hf_config(config_document(kind))
    assert_holds(checkpoint, weights_of(kind, form.get("dtype", torch.float32)))


@pytest.mark.parametrize("is_split", [False, True])
def test_reads_only_the_asked_rows(tmp_path: Path, is_split: bool) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, "moe", SEED, is_split=is_split))
    for name, expected in weights_of("moe").items():
        count = len(expected)
        for start, stop in ((0, 1), (count // 2, count), (count - 1, count), (1, 1)):
            np.testing.assert_array_equal(checkpoint.read(name, start, stop), expected[start:stop])


def test_tied_head(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "dense", SEED, tie_word_embeddings=True)
    checkpoint = open_checkpoint(path)
    assert "lm_head.weight" not in checkpoint.names
    assert_holds(checkpoint, weights_of("dense", tie_word_embeddings=True))


def test_tied_head_may_be_stored_as_a_copy(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "dense", SEED)
    config = path / "config.json"
    text = config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    config.write_text(text)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        open_checkpoint(path)
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors")
    assert "lm_head.weight" not in open_checkpoint(path).names


def test_files_are_the_exact_bytes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    (path / "vocab.json").write_text("{}")  # serves where there is no tokenizer.json
    files = open_checkpoint(path).files
    assert set(files) == {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
    }  # fmt: skip
    assert all(data == (path / name).read_bytes() for name, data in files.items())
    (path / "chat_template.jinja").unlink()
    assert "chat_template.jinja" not in open_checkpoint(path).files


def test_an_unnamed_single_shard_is_found(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "dense", SEED)
    (path / "model.safetensors").rename(path / "weights.v2.safetensors")
    assert_holds(open_checkpoint(path), weights_of("dense"))


def test_dummy_weights_for_a_directory_keep_its_config_and_files(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "moe")
    (path / "model.safetensors").unlink()
    checkpoint = open_checkpoint(path, load_format="dummy", seed=1)
    assert set(checkpoint.names) == set(expected_tensors(checkpoint.config))
    assert "tokenizer.json" in checkpoint.files
    again = open_checkpoint(path, load_format="dummy", seed=1)
    np.testing.assert_array_equal(checkpoint.read("norm.weight"), again.read("norm.weight"))
    assert checkpoint.read("layers.0.mlp.experts.down_proj", 2, 4).shape == (2, 64, 48)


def test_family_names_have_dummy_weights_only() -> None:
    checkpoint = open_checkpoint("qwen3.5-0.8b", load_format="dummy")
    assert checkpoint.config.hidden_size == 1024 and not checkpoint.files
    assert checkpoint.read("embed_tokens.weight", 248_319).shape == (1, 1024)
    with pytest.raises(CheckpointError, match="dummy"):
        open_checkpoint("qwen3.5-0.8b")
    with pytest.raises(OptionError, match="pickle"):
        open_checkpoint("qwen3.5-0.8b", load_format="pickle")  # type: ignore[arg-type]


def test_wrong_names_and_rows_are_our_own_errors() -> None:
    checkpoint = open_checkpoint("qwen3.5-0.8b", load_format="dummy")
    with pytest.raises(InternalError, match=r"model\.norm"):
        checkpoint.read("model.norm.weight")
    for start, stop in ((0, 1025), (-1, 4), (5, 4)):
        with pytest.raises(InternalError, match=r"norm\.weight"):
            checkpoint.read("norm.weight", start, stop)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay a checkpoint out as the hub client's cache does, and let the client return it."""
    repository = tmp_path / "models--someone--tiny"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    write_checkpoint(snapshot, "dense", SEED)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(repository / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")

    def snapshot_download(repo_id: str, **options: object) -> str:
        assert repo_id == "someone/tiny"
        patterns = options["allow_patterns"]
        assert isinstance(patterns, list) and not any("bin" in p or "py" in p for p in patterns)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return snapshot


def test_hub_id_reads_through_the_clients_own_links(hub_cache: Path) -> None:
    assert_holds(open_checkpoint("someone/tiny"), weights_of("dense"))
    assert_holds(open_checkpoint(hub_cache), weights_of("dense"))


def test_a_cache_whose_files_lie_elsewhere_needs_consent(hub_cache: Path, tmp_path: Path) -> None:
    """A hostile archive can hold a whole cache, with a link in the place of its folder of files."""
    blobs = hub_cache.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="follow_links=True"):
        open_checkpoint(hub_cache)
    assert_holds(open_checkpoint(hub_cache, follow_links=True), weights_of("dense"))


def test_a_directory_of_nothing_but_links_stands_for_another(tmp_path: Path) -> None:
    real, linked = write_checkpoint(tmp_path / "real", "dense", SEED), tmp_path / "linked"
    linked.mkdir()
    for file in real.iterdir():
        (linked / file.name).symlink_to(file)
    assert_holds(open_checkpoint(linked), weights_of("dense"))
    (linked / "own.txt").write_text("now it is a directory of its own")
    with pytest.raises(CheckpointError, match="symbolic link out of the directory"):
        open_checkpoint(linked)
    assert_holds(open_checkpoint(linked, follow_links=True), weights_of("dense"))


def test_a_link_inside_the_directory_is_followed(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "dense", SEED)
    (path / "model.safetensors").rename(path / "weights.bin")
    (path / "model.safetensors").symlink_to("weights.bin")
    assert_holds(open_checkpoint(path), weights_of("dense"))


def test_hub_links_must_stay_in_the_clients_blobs(hub_cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text((hub_cache / "config.json").read_text())
    (hub_cache / "config.json").unlink()
    (hub_cache / "config.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match="symbolic link"):
        open_checkpoint("someone/tiny")


def test_an_unreachable_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"someone/tiny.*no route"):
        open_checkpoint("someone/tiny")
