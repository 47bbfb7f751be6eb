"""Fixed texts in which tokenizers of the same pieces differ."""

PROBE_VERSION = 1
"""Raise it with every change of the texts: hashes of different versions are not compared."""

PROBE_TEXTS = (
    "The quick brown fox doesn't jump; they'll say it's the dog's, I'M SURE WE'VE SEEN 'em.",
    "0 12 345 6789 1234567890 3.14159 -2,000,000.50 1e-9 0xFF 10:30 2024-02-29 50% $5 №7 ½ ²",
    "  two spaces,   three,\ttab\t\ttabs \n\n\nlines\r\nand \n indented\n    four\n\t\tdeep  \n ",
    'def f(x_1, *args):\n    if x_1 <= 10**-3 and args[0] != {}:\n        return f"{x_1!r}\\n"  # done\n\n\n',
    "日本語の文章、中文句子。한국어 문장 ภาษาไทย हिन्दी العربية עברית русский язык Ελληνικά",
    "🙂 👩\u200d👩\u200d👧 🇺🇳 e\u0301 é ﬁ \uff21\uff11 \u00a0 \u2009 \u3000 \ufeff \u0007 naïve café über",
    "<s></s><unk><pad> <|endoftext|><|im_end|> <0x0A> [CLS] [MASK] https://a.example/b?c=d&e=f#g",
    "camelCaseWords snake_case_words ALLCAPS (a) [b] {c}; ... -- 'd' \"e\" !? <f/> g@h.i #j $k %l ^m &n *o +p =q",
    "Although understanding international relationships requires patience, unbelievable misinterpretations of "
    "electromagnetic phenomena frequently reappear throughout undergraduate laboratories; nevertheless, thoughtful "
    "experimentalists rediscover hydrodynamics, photosynthesis, jurisprudence, thermodynamic equilibrium and "
    "counterrevolutionary antidisestablishmentarianism whenever knowledgeable neighbours quietly exchange views.",
)
"""Digits, contractions, spaces, lines, scripts, symbols, special tokens. No long runs, which rounding cuts."""
