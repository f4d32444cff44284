"""Chat templates: what transformers renders, refused messages, hostile templates."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from longspan import CheckpointError, InvalidArgument, Unsupported
from longspan.chat_template import ChatTemplate

USER = {"role": "user", "content": "Hi  there\n"}
ANSWER = {"role": "assistant", "content": "The answer is "}
SYSTEM = {"role": "system", "content": "Be <brief> & 'kind'."}
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, USER],
    [USER, ANSWER],
    [SYSTEM, USER, {"role": "assistant", "content": "Ünï ✓"}],
]
TEMPLATES = {
    "smollm2": None,
    "strips": (
        "{{ bos_token }}\n"
        "{% for m in messages %}\n"
        "    {%- if m.role == 'system' and not loop.first %}\n"
        "        {{ raise_exception('system must come first') }}\n"
        "    {% endif %}\n"
        "    [{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}[assistant]{% endif %}\n"
    ),
    "json": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'skip' %}"
        "{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}"
        "{{ ns.n }}{{ m | tojson }}{{ m.content | tojson(indent=2) }}"
        "{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if not tools is none %}tools{% endif %}{% endfor %}"
        "{{ 'A' if add_generation_prompt else 'B' }}{{ unk_token is defined }}"
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_what_transformers_renders(name: str, smollm2_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|im_end|>"
    if TEMPLATES[name] is None:
        template = ChatTemplate.from_dir(smollm2_dir, special)
    else:
        tokenizer.chat_template = TEMPLATES[name]
        template = ChatTemplate(TEMPLATES[name], special)
    for messages in CONVERSATIONS:
        # transformers leaves its mark where a template repeats the message to be continued.
        continues = messages[-1]["role"] == "assistant" and name != "json"
        expected = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not continues,
            continue_final_message=continues,
        )
        if continues or messages[-1]["role"] != "assistant":
            assert template.render(messages) == expected
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert template.render(messages, add_generation_prompt=False) == whole


def test_messages_given_are_not_changed() -> None:
    messages = [dict(USER), dict(ANSWER)]
    ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render(messages)
    assert messages == [USER, ANSWER]


def test_text_parts_are_joined_by_newlines() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}]) == "a\nb"


@pytest.mark.parametrize(
    ("messages", "error", "expected"),
    [
        ([], InvalidArgument, "at least one"),
        (["hi"], InvalidArgument, r"messages\[0\]: expected a dict"),
        ([USER, {"content": "x"}], InvalidArgument, r"messages\[1\]: expected a dict"),
        ([{"role": "user"}], InvalidArgument, r"messages\[0\].content: .* got NoneType"),
        ([{"role": "user", "content": 3}], InvalidArgument, "got int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            Unsupported,
            "type 'text' only",
        ),
        ([USER, SYSTEM], InvalidArgument, "system must come first"),
    ],
)
def test_messages_that_do_not_fit_are_refused(
    messages: list[Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        ChatTemplate(TEMPLATES["strips"] or "").render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now['__globals__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ '%s'.__mod__ }}",
        "{% set x = messages.append(1) %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ messages[0] + 1 }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    ],
)
def test_a_hostile_template_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(source).render([USER])


@pytest.mark.parametrize("source", ["{% for %}", "{{", "{% nonsense %}", "{{ x | nofilter }}"])
def test_a_malformed_template_is_refused_at_once(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(source)


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert ChatTemplate.from_dir(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"

    def rendered(chat_template: Any) -> str:
        config.write_text(json.dumps({"chat_template": chat_template}))
        template = ChatTemplate.from_dir(tmp_path)
        assert template is not None
        return template.render([USER])

    assert rendered("from config") == "from config"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert rendered(named) == "d"
    with pytest.raises(CheckpointError, match="named 'default'"):
        rendered(named[:1])
    with pytest.raises(CheckpointError, match="expected a string"):
        rendered(7)
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert rendered("from config") == "from file"


def test_a_template_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("mine {{ bos_token }}")
    special = {"bos_token": "<s>"}
    for config in (path, str(path)):
        assert ChatTemplate.from_user(config, special).render([USER]) == "mine <s>"
    for config in ({"chat_template": "x"}, SimpleNamespace(chat_template="x", model_name=None)):
        assert ChatTemplate.from_user(config).render([USER]) == "x"
    with pytest.raises(CheckpointError, match="absent"):
        ChatTemplate.from_user(tmp_path / "absent")
    with pytest.raises(Unsupported, match="model_name"):
        ChatTemplate.from_user({"chat_template": "x", "model_name": "vicuna"})
    for bad in ({}, 7, {"chat_template": 7}):
        with pytest.raises(InvalidArgument, match="expected a path or a 'chat_template', got"):
            ChatTemplate.from_user(bad)
