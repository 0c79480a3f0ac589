"""How the VQA score reads an answer before it compares: without punctuation, articles and spelling variants.

The rules are those of the VQA evaluation (https://visualqa.org/evaluation.html), oddities of its program
included, as VLMEvalKit follows them (``vlmeval/dataset/utils/vqa_eval.py``).
"""

from __future__ import annotations

import re

_ARTICLES = frozenset({"a", "an", "the"})
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_COUNTED.split())}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Words that are recognised with any one of their apostrophes missing.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_SPELLINGS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS.split()
    for at, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}


def plain(answer: str) -> str:
    """The answer as it is compared."""
    words = _without_punctuation(" ".join(answer.strip().split("\n")).replace("\t", " ")).lower().split()
    numbers = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_SPELLINGS.get(word, word) for word in numbers if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark beside a space goes, all of them do where a number has a comma; others become a space."""
    kept = text
    number = re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if beside_space or number else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", kept)
