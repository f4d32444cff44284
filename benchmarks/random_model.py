"""A checkpoint of random weights in the shape of the reference job: values do not matter to speed.

InternLM2.5-7B-Chat-1M's shape (7.74 billion parameters, dynamic NTK factor 2.5 beyond 262144
tokens) under the Llama family's names, 15.5 GB of bfloat16, and a tokenizer that makes about as
many tokens of English as that model's own. Needs torch and tokenizers; quick on a GPU.

    python benchmarks/random_model.py /dev/shm/reference-job
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

REFERENCE_JOB: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 92544,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e7,
    "rope_scaling": {"rope_type": "dynamic", "factor": 2.5},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def tensors(config: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes, in groups that go into one file each."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    files: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (config["vocab_size"], hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (config["vocab_size"], hidden),
        }
    ]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        files.append(
            {
                layer + "input_layernorm.weight": (hidden,),
                layer + "post_attention_layernorm.weight": (hidden,),
                layer + "self_attn.q_proj.weight": (q, hidden),
                layer + "self_attn.k_proj.weight": (kv, hidden),
                layer + "self_attn.v_proj.weight": (kv, hidden),
                layer + "self_attn.o_proj.weight": (hidden, q),
                layer + "mlp.gate_proj.weight": (inner, hidden),
                layer + "mlp.up_proj.weight": (inner, hidden),
                layer + "mlp.down_proj.weight": (hidden, inner),
            }
        )
    return files


def write(folder: Path, config: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, config["vocab_size"])
    files = tensors(config)
    index: dict[str, str] = {}
    for i, group in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        values = {}
        for tensor, shape in group.items():
            value = torch.ones(shape, device=device)
            if len(shape) == 2:
                value.normal_(std=shape[1] ** -0.5, generator=generator)
            values[tensor] = value.bfloat16().cpu()
            index[tensor] = name
        save_file(values, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    # Last: a folder that has it is whole.
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level BPE whose words are those of the passkey prompts: a token for each, as in any
    large vocabulary. Ids up to vocab_size that no text gives have a name too, so that whatever the
    weights say can be printed."""
    from longspan.eval.passkey import FILLER, QUESTION, TASK
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    room = vocab_size - len(special) - len(alphabet)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + min(max(room, 0), 1000),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    words.train_from_iterator([TASK, FILLER, f" {FILLER}", QUESTION], trainer)
    trained = json.loads(words.to_str())["model"]
    tokens = special + sorted(trained["vocab"], key=trained["vocab"].get)
    tokens += [f"<{i}>" for i in range(len(tokens), vocab_size)]
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = words.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="fewer make a slimmed model")
    args = parser.parse_args()
    write(args.folder, REFERENCE_JOB | {"num_hidden_layers": args.layers})


if __name__ == "__main__":
    main()
