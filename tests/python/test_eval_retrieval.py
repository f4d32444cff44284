"""The model built to copy a partner from anywhere: it must, in every format of the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from longspan._core import Engine, EngineConfig, GenerationConfig, InvalidArgument, Unsupported
from longspan.eval.retrieval import RetrievalModel
from oracle import torch, transformers

MODEL = RetrievalModel(head_dim=64)
KV_FORMATS = ("auto", "int8", "fp8", "int8_fp8", "int8_int4", "int4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retrieval")
    MODEL.write(path)
    return path


def load(folder: Path, length: int, **options: str) -> Engine:
    config = EngineConfig(
        device="cpu", session_len=length + MODEL.num_keys, max_batch_size=1, **options
    )
    try:
        return Engine.load(str(folder), config)
    except Unsupported as error:
        pytest.skip(str(error))


def answers(engine: Engine, ids: list[int]) -> list[int]:
    config = GenerationConfig(max_new_tokens=MODEL.num_keys, ignore_eos=True)
    return engine.generate(ids, config).wait().token_ids


def test_transformers_finds_the_same(folder: Path) -> None:
    ids, partners = MODEL.text(600)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Teacher-forced: each partner is the mark of the next key.
    fed = [*ids, *partners[:-1]]
    with torch.no_grad():
        logits = model(torch.tensor([fed])).logits[0, len(ids) - 1 :].numpy()
    assert logits.argmax(-1).tolist() == partners
    with load(folder, 600, dtype="float32") as engine:
        assert answers(engine, ids) == partners
        ours = engine.logits(fed, range(len(ids) - 1, len(fed))).wait().logits
    assert np.abs(ours - logits).max() < 1e-3


@pytest.mark.parametrize("kv_cache_dtype", KV_FORMATS)
def test_every_key_is_found(folder: Path, kv_cache_dtype: str) -> None:
    ids, partners = MODEL.text(16_384, seed=1)
    options = {"dtype": "bfloat16", "kv_cache_dtype": kv_cache_dtype}
    with load(folder, len(ids), **options) as engine:
        assert answers(engine, ids) == partners


def test_every_key_is_found_in_32k(folder: Path) -> None:
    ids, partners = MODEL.text(32_768, seed=2)
    assert len(partners) == 20
    with load(folder, len(ids), dtype="bfloat16") as engine:
        assert answers(engine, ids) == partners


def test_only_the_context_tells_the_partner(folder: Path) -> None:
    ids, partners = MODEL.text(2_000)
    others = [MODEL.partner(k, (p + 1) % MODEL.num_partners) for k, p in enumerate(partners)]
    swap = dict(zip(partners, others, strict=True))
    with load(folder, len(ids), dtype="bfloat16") as engine:
        assert answers(engine, [swap.get(i, i) for i in ids]) == others
        # Without its partner a key is answered by chance at best.
        filler = MODEL.vocab_size - 1
        assert answers(engine, [filler if i == partners[0] else i for i in ids])[0] != partners[0]


def test_shapes_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="head_dim: expected a power of two"):
        RetrievalModel(head_dim=96)
    with pytest.raises(InvalidArgument, match="num_heads: expected a multiple of 3, got 4"):
        RetrievalModel(num_kv_heads=3)
    with pytest.raises(InvalidArgument, match=r"num_keys: expected an integer in \[1, 56\]"):
        RetrievalModel(num_keys=57, head_dim=64)
    with pytest.raises(InvalidArgument, match="length: expected at least 42, got 41"):
        MODEL.text(41)
