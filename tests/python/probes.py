"""Texts that tokenizers tend to disagree about."""

PROBES = [
    "",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,   three, a\ttab\t\tand\nnew\r\nlines\n\n\n  indented",
    "it's they'll I'M we've WOULDN'T 'tis",
    "1234567890 3.14159 1,000,000 0x1F v2.0.1 10^6 1st",
    "naïve café Zürich  Å A\u030a ﬁ ½",
    "日本語のテキスト、한국어 텍스트, русский текст, עברית, العربية, हिन्दी",
    "🙂👍🏽👩‍👩‍👧‍👦 emoji 🇩🇪 flags",
    "<|im_start|>user\nhi<|im_end|>\n",
    "text<|endoftext|> more <|im_start|><|im_start|>",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
    "https://example.com/a?b=c&d=%20#frag user@example.org",
    "a" * 300 + " " * 300 + "\n" * 30,
    "\x00\x01\x7f\u200b\u2028\ufeff",
    "!!!???...,,,---===***///\\\\\\|||",
]
