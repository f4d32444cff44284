"""torch's .bin files: the same model, and nothing in them is ever run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tiny_llama
from longspan import CapacityError, CheckpointError, Pipeline, Unsupported, pipeline
from longspan import EngineConfig as Config
from longspan.torch_weights import cached_model_dir
from safetensors.torch import load_file

torch = pytest.importorskip("torch", reason="torch reads its own files")

OPTIONS: dict[str, Any] = {"dtype": "float32", "session_len": 128, "max_batch_size": 1}
IDS = list(range(40, 90))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "longspan" / "torch"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    write_tiny_llama(path)
    return path


def to_bin(path: Path, shards: int = 1, **save: Any) -> dict[str, Any]:
    """Replaces the safetensors of a directory by .bin files; returns the tensors."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, path / "pytorch_model.bin", **save)
        return tensors
    weight_map = {}
    for shard in range(shards):
        name = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = dict(sorted(tensors.items())[shard::shards])
        torch.save(part, path / name, **save)
        weight_map |= dict.fromkeys(part, name)
    index = json.dumps({"weight_map": weight_map})
    (path / "pytorch_model.bin.index.json").write_text(index)
    return tensors


def perplexity(path: Path, **options: Any) -> float:
    with pipeline(path, Config(**OPTIONS, **options)) as pipe:
        return float(pipe.get_ppl(IDS)[0])


@pytest.mark.parametrize(
    ("shards", "save"), [(1, {}), (3, {}), (1, {"_use_new_zipfile_serialization": False})]
)
def test_the_model_is_the_same(
    model_dir: Path, cache: Path, shards: int, save: dict[str, Any]
) -> None:
    expected = perplexity(model_dir)
    to_bin(model_dir, shards, **save)
    assert perplexity(model_dir, use_safetensors=False) == expected
    made = [path for path in cache.iterdir() if path.is_dir()]
    assert len(made) == 1
    times = {file: file.stat().st_mtime_ns for file in made[0].iterdir()}
    assert perplexity(model_dir, use_safetensors=False) == expected
    assert times == {file: file.stat().st_mtime_ns for file in made[0].iterdir()}, "made again"
    status = (model_dir / "config.json").stat()
    os.utime(model_dir / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    cached_model_dir(model_dir)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_the_option_is_asked_for(model_dir: Path) -> None:
    to_bin(model_dir)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*use_safetensors=False"):
        perplexity(model_dir)


def test_tied_and_transposed_tensors(model_dir: Path) -> None:
    """Tensors that share storage, or are views of it, which safetensors has no way to say."""
    expected = perplexity(model_dir)
    tensors = to_bin(model_dir)
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].t().contiguous().t()
    torch.save(tensors, model_dir / "pytorch_model.bin")
    assert perplexity(model_dir, use_safetensors=False) == expected


class _Runs:
    """A pickle that runs code when it is loaded as pickles are."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_file_is_refused_and_not_run(
    model_dir: Path, tmp_path: Path, cache: Path, new_format: bool
) -> None:
    mark = tmp_path / "it ran"
    tensors = to_bin(model_dir)
    target = model_dir / "pytorch_model.bin"
    torch.save({**tensors, "extra": _Runs(mark)}, target, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected tensors and nothing"):
        perplexity(model_dir, use_safetensors=False)
    assert not mark.exists()
    assert not [path for path in cache.iterdir() if path.is_dir()], "something was left"
    torch.load(target, weights_only=False)
    assert mark.exists(), "the test's pickle is harmless"


def test_what_is_no_dictionary_of_dense_tensors_is_refused(model_dir: Path) -> None:
    to_bin(model_dir)
    target = model_dir / "pytorch_model.bin"
    dense = torch.zeros(2)
    cases: list[tuple[Any, str]] = [
        ([dense], "expected tensors by name, got list"),
        ({"a": 3}, "expected tensors by name, got int at 'a'"),
        ({7: dense}, "expected tensors by name, got Tensor at 7"),
        ({"a": dense.to_sparse()}, "a: expected a dense tensor"),
        ({"a": torch.zeros(1).expand(10**9)}, "a: expected a dense tensor within the file's"),
        ({"a": torch.empty(3, device="meta")}, "a: expected a dense tensor"),
    ]
    for content, expected in cases:
        torch.save(content, target)
        with pytest.raises(CheckpointError, match=expected):
            cached_model_dir(model_dir)
    whole = torch.save({"a": torch.zeros(1000)}, target) or target.read_bytes()
    for damaged in (b"", b"\x80\x02}q\x00.", whole[:2000], b"\0" * 5000, whole[2000:]):
        target.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: expected"):
            cached_model_dir(model_dir)


def test_the_index_is_not_trusted(model_dir: Path) -> None:
    tensors = to_bin(model_dir, shards=2)
    index = model_dir / "pytorch_model.bin.index.json"
    for bad in ("../x.bin", "/etc/x.bin", "a/b.bin", "x.safetensors", ""):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(CheckpointError, match=r"expected names of .bin files in the same"):
            cached_model_dir(model_dir)
    for text in ('{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="weight_map: expected names"):
            cached_model_dir(model_dir)
    index.write_text('{"weight_map": {"a": "absent.bin"}}')
    with pytest.raises(CheckpointError, match=r"expected absent\.bin, as .* says"):
        cached_model_dir(model_dir)
    for name in ("one.bin", "two.bin"):
        torch.save(tensors, model_dir / name)
    index.write_text('{"weight_map": {"a": "one.bin", "b": "two.bin"}}')
    with pytest.raises(CheckpointError, match=r"two\.bin: expected each tensor once, got lm|model"):
        cached_model_dir(model_dir)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"expected pytorch_model\.bin or .*, got neither"):
        cached_model_dir(model_dir)


def test_without_a_safe_torch(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_bin(model_dir)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(Unsupported, match=r"torch 2\.6 or later, got 2\.5\.1"):
        cached_model_dir(model_dir)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Unsupported, match="use_safetensors=False: expected torch to read"):
        cached_model_dir(model_dir)


def test_a_disk_that_is_too_small(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_bin(model_dir)
    free = type("usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(CapacityError, match="free bytes to convert, got 10"):
        Pipeline(model_dir, Config(**OPTIONS, use_safetensors=False))
