"""Numbers in English and Chinese words, rewritten in digits."""

from __future__ import annotations

import re

_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = {word: i for i, word in enumerate(_UNITS)} | {word: 10 * i for i, word in enumerate(_TENS, 2)} | {"none": 0}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {
    "half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10, "twelfth": 12, "twentieth": 20, "hundredth": 100, "thousandth": 1000,
}  # fmt: skip
_WORD = "|".join(sorted([*_VALUES, "hundred", "dozen", *_LARGE], key=len, reverse=True))
_RUN = rf"(?:an?\s+(?=(?:hundred|dozen|thousand|[mbt]r?illion)\b))?(?:{_WORD})(?:[\s-]+(?:and\s+)?(?:{_WORD}))*"
_PART = rf"(?:{'|'.join(_PARTS)})s?"
_ENGLISH = re.compile(
    rf"\b(?P<minus>minus\s+|negative\s+)?(?:(?P<whole>{_RUN})\s+and\s+(?P<top>an?|{_RUN})[\s-]+(?P<part>{_PART})"
    rf"|(?P<top2>an?|{_RUN})[\s-]+(?P<part2>{_PART})|(?P<half>half)"
    rf"|(?P<run>{_RUN})(?:\s+point(?P<decimals>(?:[\s-]+(?:{'|'.join(_UNITS[:10])}))+))?)\b",
    re.I,
)
_PRONOUN = re.compile(r"\b(?:the|this|that|each|every|which|another|any|other|no)\s+(?:\w+\s+)?$", re.I)

_DIGITS = dict(zip("零一二三四五六七八九", range(10), strict=True)) | {"〇": 0, "两": 2}
_SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_FORMAL = str.maketrans("壹贰叁肆伍陆柒捌玖拾佰仟萬億負點", "一二三四五六七八九十百千万亿负点")
_CHARACTERS = "".join([*_DIGITS, *_SCALES])
_CHINESE = re.compile(
    rf"(?<![第{_CHARACTERS}])(?P<minus>负)?(?:(?P<bottom>[{_CHARACTERS}]+)分之(?P<top>[{_CHARACTERS}]+)"
    rf"|(?P<run>[{_CHARACTERS}]+)(?:点(?P<decimals>[零〇一二三四五六七八九]+)(?![分{_CHARACTERS}]))?)(?P<half>半)?"
)


def _english(words: str) -> int | None:
    """Return the value of number words, or None if they are not one number ("nineteen ninety-nine", "one two")."""
    total, group, last = 0, 0, None  # last: the size of the number word before
    for word in re.split(r"[\s-]+", words.casefold()):
        if word in ("and", "a", "an"):
            continue
        if word in _VALUES:
            value = _VALUES[word]
            if last is not None and (last < 20 or (last < 100 and value >= 10) or not value):
                return None
            group, last = group + value, max(value, 1)
            if value >= 20:
                last = 20
        elif word == "hundred" or word == "dozen":
            if group >= 100:
                return None
            group, last = (group if last is not None else 1) * (100 if word == "hundred" else 12), 100
        else:
            if total and total % (1000 * _LARGE[word]):
                return None
            total, group, last = total + (group if last is not None else 1) * _LARGE[word], 0, 100
    return total + group


def _chinese(characters: str) -> int | None:
    if all(c in _DIGITS for c in characters):
        return int("".join(str(_DIGITS[c]) for c in characters))
    for large in "亿万千百十":
        factor = _SCALES[large]
        next_scale = factor // 10
        if large in characters:
            left, _, right = characters.rpartition(large)
            top = _chinese(left) if left else 1
            if right in _DIGITS and right not in "零〇":  # 三百五 is 350
                rest: int | None = _DIGITS[right] * next_scale
            else:
                rest = _chinese(right.lstrip("零〇")) if right.strip("零〇") else 0
            small = rest is not None and rest < factor and top is not None and (factor >= 10**4 or top < 10)
            return top * factor + rest if small and top is not None and rest is not None else None
    return None


def spell_in_digits(text: str) -> str:
    """Rewrite number words of a normalized text without digits in digits: "two thirds" is 2/3, 一百二十 is 120.

    Words that are no single number stay as they are, as does "one" as a pronoun.
    """
    if re.search(r"\d", text):
        return text

    def english(m: re.Match[str]) -> str:
        sign = "-" if m["minus"] else ""
        if m["half"]:
            if _PRONOUN.search(text[: m.start()]):  # "the left half"
                return m.group()
            return sign + "1/2"
        if part := m["part"] or m["part2"]:
            word = (m["top"] or m["top2"]).casefold()
            top = 1 if word in ("a", "an") else _english(word)
            whole = _english(m["whole"]) if m["whole"] else 0
            if top is None or whole is None:
                return m.group()
            return f"{sign}{f'{whole} ' if m['whole'] else ''}{top}/{_PARTS[part.casefold().removesuffix('s')]}"
        run = m["run"]
        if run.casefold() == "one" and _PRONOUN.search(text[: m.start()]):
            return m.group()
        value = _english(run)
        if value is None:
            sides = re.split(r"\s+and\s+", run)
            values = [_english(side) for side in sides]
            return m.group() if None in values or len(sides) < 2 else " and ".join(map(str, values))
        return f"{sign}{value}" + ("." + "".join(str(_VALUES[d.casefold()]) for d in m["decimals"].replace("-", " ").split())
                                   if m["decimals"] else "")  # fmt: skip

    def chinese(m: re.Match[str]) -> str:
        sign, half = "-" if m["minus"] else "", m["half"] or ""
        after = text[m.end() :]
        if m["bottom"]:
            bottom, top = _chinese(m["bottom"]), _chinese(m["top"])
            if not bottom or top is None:
                return m.group()
            return f"{sign}{top}%{half}" if m["bottom"] == "百" else f"{sign}{top}/{bottom}{half}"
        ends = after[:1] in ("", "个", "是", ".", " ") or m["decimals"]
        if m["run"] in ("一", "万", "千") and not ends and len(text) > 4:
            return m.group()  # as in 一样 and 万一
        value = _chinese(m["run"])
        if value is None:
            return m.group()
        return f"{sign}{value}{'.' + ''.join(str(_DIGITS[c]) for c in m['decimals']) if m['decimals'] else ''}{half}"

    text = text.translate(_FORMAL)
    return _CHINESE.sub(chinese, re.sub("(?<!\\w)一半(?!\\w)", "1/2", _ENGLISH.sub(english, text)))
