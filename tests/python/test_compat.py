"""The three programs of LMDeploy's page on context length extrapolation, with the import changed
and model, lengths and tp set to what a small machine has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from longspan import GenerationConfig, Pipeline, Response, TurbomindEngineConfig, pipeline

SESSION_LEN = 2048


@pytest.fixture(scope="module")
def pipe(smollm2_dir: Path) -> Iterator[Pipeline]:
    backend_config = TurbomindEngineConfig(
        rope_scaling_factor=2.5,
        session_len=SESSION_LEN,
        max_batch_size=1,
        cache_max_entry_count=0.7,
        tp=1,
    )
    with pipeline(str(smollm2_dir), backend_config=backend_config) as pipe:
        yield pipe


def test_usage(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    gen_config = GenerationConfig(top_p=0.8, top_k=40, temperature=0.8, max_new_tokens=32)
    response = pipe("What is the capital of France?", gen_config=gen_config)
    print(response)
    assert isinstance(response, Response)
    assert capsys.readouterr().out.startswith(response.text + "\n")
    assert response.finish_reason in ("stop", "length")
    assert 0 < response.generate_token_len <= 32


def test_passkey_retrieval(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    tok = pipe.tokenizer
    task = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there."
    )
    garbage = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    rng = np.random.default_rng(0)
    for _ in range(1):
        n_times = (SESSION_LEN - 1000) // len(tok.encode(garbage))
        n_prefix = int(rng.integers(0, n_times))
        pass_key = int(rng.integers(1, 50000))
        lines = [
            task,
            " ".join([garbage] * n_prefix),
            f"The pass key is {pass_key}. Remember it. {pass_key} is the pass key.",
            " ".join([garbage] * (n_times - n_prefix)),
            "What is the pass key? The pass key is",
        ]
        response = pipe([" ".join(lines)])
        print(pass_key, response)
        assert isinstance(response, list) and len(response) == 1
        assert str(pass_key) in response[0].text
    assert "text=" in capsys.readouterr().out


def test_perplexity(pipe: Pipeline, smollm2_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir, trust_remote_code=True)
    text = "A language model assigns a probability to every sentence, likely or not."
    input_ids = tokenizer.encode(text)
    ppl = pipe.get_ppl(input_ids)[0]
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    ids = torch.tensor([input_ids])
    with torch.inference_mode():
        expected = math.exp(reference(ids, labels=ids).loss.item())
    assert ppl == pytest.approx(expected, rel=0.03)  # bfloat16 weights, 16 tokens
