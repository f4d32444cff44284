"""Every family against HF transformers in float32 on tiny random models (see oracle.py).

transformers has no InternLM2: there the reference is a Llama whose weights are packed as InternLM2
packs them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import transformers
from conftest import write_byte_tokenizer
from longspan import CheckpointError, Pipeline, Unsupported
from longspan import EngineConfig as Config
from longspan._core import Engine, EngineConfig, GenerationConfig, plan_memory
from ranks import check_shared
from safetensors.numpy import load_file, save_file

# Two layers deep, logits below 10, as the tiny Llamas of test_hf_parity.py.
TOLERANCE = 1e-4

HEADS = {
    "mha": {},
    "gqa-9-3": dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, vocab_size=333),
    "mqa": dict(num_attention_heads=8, num_key_value_heads=1, tie_word_embeddings=True),
}
HEAD_DIM = dict(hidden_size=54, num_attention_heads=3, num_key_value_heads=1, head_dim=18)
MISTRAL, QWEN2, QWEN3 = "Mistral", "Qwen2", "Qwen3"
CASES: list[tuple[str, dict[str, Any]]] = [
    *((MISTRAL, {"sliding_window": None} | heads) for heads in [*HEADS.values(), HEAD_DIM]),
    *((QWEN2, heads) for heads in HEADS.values()),
    (QWEN2, dict(use_sliding_window=False, sliding_window=64, vocab_size=1001)),
    *((QWEN3, heads | {"head_dim": 20}) for heads in HEADS.values()),
    (QWEN3, HEAD_DIM | {"attention_bias": True}),
    (QWEN3, {"head_dim": 128, "num_key_value_heads": 2}),
]


def logits_of(path: Path | str, ids: list[int], **options: Any) -> np.ndarray:
    config = EngineConfig(dtype="float32", session_len=320, max_batch_size=1, **options)
    with Engine.load(str(path), config) as engine:
        return engine.logits(ids, list(range(len(ids)))).wait().logits


@pytest.mark.parametrize(("family", "sizes"), CASES)
def test_logits_are_those_of_transformers(family: str, sizes: dict[str, Any]) -> None:
    """Every position of lengths around the block and tile sizes."""
    hf, path = oracle.tiny(family, **sizes)
    config = EngineConfig(dtype="float32", session_len=256, max_batch_size=1)
    with Engine.load(path, config) as engine:
        for length in (1, 2, 63, 65, 200):
            ids = oracle.random_ids(length, hf.config.vocab_size, seed=length)
            expected, _ = hf.run(ids)
            logits = engine.logits(ids, list(range(length))).wait().logits
            assert np.abs(logits - expected).max() < TOLERANCE, f"length {length}"
        assert engine.model.num_parameters == sum(p.numel() for p in hf.model.parameters())


@pytest.mark.parametrize("family", [MISTRAL, QWEN2, QWEN3])
def test_decoding_is_judged_by_one_forward(family: str) -> None:
    hf, path = oracle.tiny(family, num_key_value_heads=2)
    ids = oracle.random_ids(50, hf.config.vocab_size)
    with Engine.load(path, EngineConfig(dtype="float32", session_len=256)) as engine:
        generation = GenerationConfig(max_new_tokens=40, ignore_eos=True)
        tokens = engine.generate(ids, generation).wait().token_ids
    expected, _ = hf.run(ids + tokens[:-1], list(range(49, 89)))
    chosen = expected[np.arange(40), tokens]
    assert (expected.max(axis=1) - chosen).max() < 2 * TOLERANCE


def test_every_part_of_a_family_matters() -> None:
    """The weights that only one family has are drawn so that leaving them out would be seen."""
    _, path = oracle.tiny(QWEN3)
    tensors = load_file(Path(path) / "model.safetensors")
    for name in ("q_norm", "k_norm"):
        norm = tensors[f"model.layers.0.self_attn.{name}.weight"]
        assert np.abs(norm - 1).max() > 0.1
    _, path = oracle.tiny(QWEN2)
    bias = load_file(Path(path) / "model.safetensors")["model.layers.0.self_attn.q_proj.bias"]
    assert np.abs(bias).max() > 0.1


# ---- InternLM 2 and 3 ----

REMOTE_CODE = "raise SystemExit('code that came with a model was run')\n"


def internlm2_config(llama: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The keys of internlm2_5-7b-chat-1m's config.json, at a tiny Llama's sizes."""
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "internlm2",
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": llama["rope_parameters"]["rope_theta"],
        "torch_dtype": "float32",
        "transformers_version": "4.41.0",
        "use_cache": True,
        **{name: llama[name] for name in same},
        **changes,
    }


def packed(q: np.ndarray, k: np.ndarray, v: np.ndarray, head_dim: int) -> np.ndarray:
    """wqkv, or its bias: for each KV head its query heads, k and v, one after another. The inverse
    of what InternLM2's code writes as "(h gs d) -> h gs d" before it cuts gs into q, k and v."""
    kv_heads = len(k) // head_dim
    q, k, v = (x.reshape(kv_heads, -1, head_dim, *x.shape[1:]) for x in (q, k, v))
    joined = np.concatenate([q, k, v], axis=1)
    return np.ascontiguousarray(joined.reshape(-1, *joined.shape[3:]))


def repack(llama_dir: str, path: Path, shards: int = 2, **config: Any) -> dict[str, np.ndarray]:
    """Writes a Llama, with or without biases, as an InternLM2; returns its tensors."""
    llama = json.loads((Path(llama_dir) / "config.json").read_text())
    tensors = load_file(Path(llama_dir) / "model.safetensors")
    out = {
        "model.tok_embeddings.weight": tensors["model.embed_tokens.weight"],
        "model.norm.weight": tensors["model.norm.weight"],
    }
    if not llama["tie_word_embeddings"]:
        out["output.weight"] = tensors["lm_head.weight"]
    names = {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(llama["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                tensor = tensors.get(f"{prefix}{theirs}.{kind}")
                if tensor is not None:
                    out[f"{prefix}{ours}.{kind}"] = tensor
            parts = [tensors.get(f"{prefix}self_attn.{p}_proj.{kind}") for p in "qkv"]
            if parts[0] is not None:
                out[f"{prefix}attention.wqkv.{kind}"] = packed(*parts, llama["head_dim"])
    config = internlm2_config(llama, **config)
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    for module in ("configuration_internlm2", "modeling_internlm2", "tokenization_internlm2"):
        (path / f"{module}.py").write_text(REMOTE_CODE)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: out[name] for name in sorted(out)[shard::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


INTERNLM2 = {
    "mha": {},
    "gqa-4-2": dict(num_key_value_heads=2),
    "gqa-9-3": dict(hidden_size=72, num_attention_heads=9, num_key_value_heads=3, vocab_size=333),
    "gqa-32-8": dict(hidden_size=256, num_attention_heads=32, num_key_value_heads=8),
    "mqa": dict(num_attention_heads=8, num_key_value_heads=1),
    "tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
}


@pytest.mark.parametrize("name", INTERNLM2)
def test_internlm2_is_a_llama_packed_otherwise(name: str, tmp_path: Path) -> None:
    """The logits are HF's for the Llama, and bit for bit the engine's own for it."""
    hf, llama_dir = oracle.tiny_llama(**INTERNLM2[name])
    repack(llama_dir, tmp_path)
    ids = oracle.random_ids(150, hf.config.vocab_size)
    logits = logits_of(tmp_path, ids)
    assert np.array_equal(logits, logits_of(llama_dir, ids))
    assert np.abs(logits - hf.run(ids)[0]).max() < TOLERANCE


def test_internlm2_with_biases(tmp_path: Path) -> None:
    """bias: of wqkv and wo; so a Llama whose o has one too."""
    hf, llama_dir = oracle.tiny_llama(attention_bias=True, num_key_value_heads=2)
    repack(llama_dir, tmp_path, bias=True)
    ids = oracle.random_ids(100, hf.config.vocab_size)
    logits = logits_of(tmp_path, ids)
    assert np.array_equal(logits, logits_of(llama_dir, ids))
    assert np.abs(logits - hf.run(ids)[0]).max() < TOLERANCE


def test_internlm2_past_its_trained_length(tmp_path: Path) -> None:
    """As internlm2_5-7b-chat-1m: dynamic NTK by 2.5 in config.json, spelled with `type`."""
    hf, llama_dir = oracle.tiny_llama(
        rope=(("rope_type", "dynamic"), ("factor", 2.5), ("rope_theta", 5e7)),
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    repack(llama_dir, tmp_path, rope_scaling={"type": "dynamic", "factor": 2.5})
    for length in (100, 320):
        ids = oracle.random_ids(length, hf.config.vocab_size)
        assert np.abs(logits_of(tmp_path, ids) - hf.run(ids)[0]).max() < TOLERANCE


def test_internlm2_runs_no_code_and_ends_where_it_says(tmp_path: Path) -> None:
    """A pipeline on a directory with remote code; 5 of generation_config.json ends an answer."""
    hf, llama_dir = oracle.tiny_llama(num_key_value_heads=2, vocab_size=260)
    repack(llama_dir, tmp_path)
    write_byte_tokenizer(tmp_path, chat_template=None)
    with Pipeline(tmp_path, Config(dtype="float32", session_len=256)) as pipe:
        response = pipe("some text")
        assert len(response.token_ids) > 0
        ids = pipe.tokenizer.encode("some text")
        expected, _ = hf.run([*ids, *response.token_ids])
    greedy = expected.argmax(axis=1)[len(ids) - 1 :].tolist()
    assert response.token_ids == greedy[: len(response.token_ids)]
    assert response.finish_reason == "length" or greedy[len(response.token_ids)] in (2, 5, 259)


def test_a_bad_value_of_a_packed_tensor_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    _, llama_dir = oracle.tiny_llama(num_key_value_heads=2)  # 16 rows a head: q q k v, q q k v
    tensors = repack(llama_dir, tmp_path, shards=1)
    for row, col in ((0, 0), (37, 5), (127, 63)):
        broken = {name: tensor.copy() for name, tensor in tensors.items()}
        broken["model.layers.1.attention.wqkv.weight"][row, col] = np.inf
        save_file(broken, tmp_path / "model-00001-of-00001.safetensors")
        with pytest.raises(CheckpointError, match=rf"layers\.1.*wqkv.*\[{row}, {col}\]"):
            logits_of(tmp_path, [1])


def test_loading_reads_every_byte_of_a_packed_tensor_once(tmp_path: Path) -> None:
    _, llama_dir = oracle.tiny_llama(num_key_value_heads=2)
    tensors = repack(llama_dir, tmp_path)
    seen: list[tuple[int, int]] = []
    config = EngineConfig(dtype="float32", session_len=64, max_batch_size=1)
    Engine.load(str(tmp_path), config, lambda done, total: seen.append((done, total))).close()
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert seen[-1] == (total, total)
    assert sorted(seen) == seen


@pytest.mark.parametrize("biased", [False, True])
def test_internlm3_logits(biased: bool, tmp_path: Path) -> None:
    """transformers runs it as the Llama it is; its own config.json says qkv_bias and bias."""
    config = transformers.InternLM3Config(
        **oracle.TINY_SIZES | {"num_key_value_heads": 2, "head_dim": 20, "attention_bias": biased},
        mlp_bias=biased,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    oracle.draw(model)
    hf = oracle.Oracle(model)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["architectures"] = ["InternLM3ForCausalLM"]
    ids = oracle.random_ids(130, 256)
    expected, _ = hf.run(ids)
    theirs = {k: v for k, v in written.items() if k not in ("attention_bias", "mlp_bias")}
    for spelling in (written, theirs | {"qkv_bias": biased, "bias": biased}):
        (tmp_path / "config.json").write_text(json.dumps(spelling))
        assert np.abs(logits_of(tmp_path, ids) - expected).max() < TOLERANCE
    for tp, cp in ((4, 1), (4, 2)):
        check_shared(tmp_path, ids, expected, TOLERANCE, tp=tp, cp=cp)


# ---- what does not fit ----


def rewrite(path: Path, name: str, **changes: Any) -> None:
    config = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(config | changes))


@pytest.mark.parametrize("family", [MISTRAL, QWEN2, QWEN3])
def test_tensors_of_another_family_are_refused(family: str, tmp_path: Path) -> None:
    """A checkpoint that is not what its config.json says never runs as if it were."""
    _, path = oracle.tiny(family, num_key_value_heads=2)
    tensors = load_file(Path(path) / "model.safetensors")
    config = json.loads((Path(path) / "config.json").read_text())
    for other in {MISTRAL, QWEN2, QWEN3} - {family}:
        changed = config | {"architectures": [f"{other}ForCausalLM"], "sliding_window": None}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"expected"):
            logits_of(tmp_path, [1])


def test_a_tensor_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    _, llama_dir = oracle.tiny_llama(num_key_value_heads=2)
    tensors = repack(llama_dir, tmp_path, shards=1)
    extra = {"model.layers.0.attention.wqkv.bias": np.zeros(128, np.float32)}
    file = "model-00001-of-00001.safetensors"
    save_file(tensors | extra, tmp_path / file)
    weight_map = dict.fromkeys(tensors | extra, file)
    index = json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"only tensors that InternLM2.*wqkv\.bias"):
        logits_of(tmp_path, [1])
    rewrite(tmp_path, "config.json", bias=True)
    with pytest.raises(CheckpointError, match=r"wo\.bias"):
        logits_of(tmp_path, [1])


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        (MISTRAL, {"sliding_window": 64}, 64),
        (MISTRAL, {"sliding_window": 4096, "max_position_embeddings": 8192}, 4096),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 100, "layer_types": None}, 100),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 100, "layer_types": None}, 100),
    ],
)
def test_a_window_shorter_than_the_session_is_refused_by_name(
    family: str, changes: dict[str, Any], window: int, tmp_path: Path
) -> None:
    options = {"sliding_window": None} if family == MISTRAL else {}
    hf, path = oracle.tiny(family, num_key_value_heads=2, **options)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((Path(path) / file).read_bytes())
    rewrite(tmp_path, "config.json", **changes)
    message = f"session_len: expected at most {window}, the sliding_window of config.json"
    for session_len in (0, window + 1):  # 0: the model's own
        config = EngineConfig(dtype="float32", session_len=session_len, max_batch_size=1)
        with pytest.raises(Unsupported, match=message):
            Engine.load(str(tmp_path), config)
        with pytest.raises(Unsupported, match=message):
            plan_memory(str(tmp_path), config)
    # No query of a session within the window sees less than all of it.
    ids = oracle.random_ids(min(window, 120), hf.config.vocab_size)
    config = EngineConfig(dtype="float32", session_len=window, max_batch_size=1)
    with Engine.load(str(tmp_path), config) as engine:
        logits = engine.logits(ids, list(range(len(ids)))).wait().logits
    assert np.abs(logits - hf.run(ids)[0]).max() < TOLERANCE


def test_an_unknown_family_is_told_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["InternLM9ForCausalLM"]}')
    with pytest.raises(Unsupported, match=r"LlamaForCausalLM, .*InternLM2.*Qwen3.*InternLM9"):
        Engine.load(str(tmp_path), EngineConfig())
