"""Captions as LlamaGen cleaned them before its text encoder read them.

What a policy was trained on decides what it understands: a prompt that is not cleaned the same way
gives other features. The rules, their order and their quirks are therefore kept, such as cleaning
twice and dropping Chinese characters.

Source: PixArt's and DeepFloyd's caption cleaning as in FoundationVision/LlamaGen at ce98ec4,
language/t5.py; AR-GRPO at 65947ad has the same.
"""

import html
import re
import warnings
from urllib.parse import unquote_plus

from argrpo.text_config import Cleaning

MAX_CHARACTERS = 10_000
"""Longer prompts are cut here first: 120 tokens never reach so far, and some of the patterns take
time that grows with the square of a word."""

_CHINESE = (
    "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"
)
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_LINK = (
    rf"\b((?:%s:(?:\/{{1,3}}|[a-zA-Z0-9%%])|"
    rf"[a-zA-Z0-9.\-]+[.](?:{_DOMAINS})[\w/-]*\b\/?(?!@)))"
)

_Rule = tuple[re.Pattern[str], str]


def _rules(*pairs: tuple[str, str]) -> list[_Rule]:
    return [(re.compile(pattern), replacement) for pattern, replacement in pairs]


# On the text with its markup, in lower case.
_IN_MARKUP = _rules(("<person>", "person"), (_LINK % "https?", ""), (_LINK % "www", ""))

# On the text without markup: names, scripts, punctuation, numbers that say nothing of a picture.
_BEFORE_REPAIR = _rules(
    (r"@[\w\d]+\b", ""),
    (f"[{_CHINESE}]+", ""),
    (f"[{_DASHES}]+", "-"),
    ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
    ("[\u2018\u2019]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILE_TYPES})", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~\)\(\]\[\}\{\|\\/\*]{1,}", " "),
    (r"\s+\.\s+", " "),
)

# On the text with its broken characters repaired: what shops write, and what is left over.
_AFTER_REPAIR = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILE_TYPES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b", ""),
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)

# this-is-my-cat is four words; a hyphen or two belong to a word.
_JOINT = re.compile(r"[-_]")
_MOST_JOINTS = 3


def clean(text: str, cleaning: Cleaning) -> str:
    """A prompt as its encoder reads it; at most `MAX_CHARACTERS` of it are looked at.

    Args:
        text: as people write it.
        cleaning: llamagen takes every rule below; lower makes lower case without spaces at the
            ends, as LlamaGen where cleaning is off; none leaves the text.

    Raises:
        ValueError: the text has markup, and beautifulsoup4 is not installed.
    """
    # JSON can spell halves of characters, which no tokenizer takes.
    text = text[:MAX_CHARACTERS].encode("utf-8", "replace").decode("utf-8")
    if cleaning == "none":
        return text
    if cleaning == "lower":
        return text.lower().strip()
    # Twice, as the features were made that the published policies learned from.
    return _cleaned(_cleaned(text))


def _cleaned(text: str) -> str:
    text = _applied(_IN_MARKUP, unquote_plus(text).strip().lower())
    text = _applied(_BEFORE_REPAIR, _without_markup(text))
    if len(_JOINT.findall(text)) > _MOST_JOINTS:
        text = _JOINT.sub(" ", text)
    # Here and not above, so that settings are read where ftfy is missing.
    from ftfy import fix_text

    repaired = html.unescape(html.unescape(fix_text(text))).strip()
    return _applied(_AFTER_REPAIR, repaired).strip()


def _applied(rules: list[_Rule], text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def _without_markup(text: str) -> str:
    """The text of an HTML fragment; a text without `<` and `&` has no markup and is not parsed."""
    if "<" not in text and "&" not in text:
        return text
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise ValueError(
            "text_encoder.cleaning: expected the package beautifulsoup4 for a prompt with < or & "
            "in it, got none; pip install 'argrpo[text]'"
        ) from error
    with warnings.catch_warnings():
        # A prompt that looks like a path or an address is still a prompt.
        warnings.simplefilter("ignore")
        return BeautifulSoup(text, features="html.parser").text
