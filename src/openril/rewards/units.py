"""Measuring units and currencies, a closed list. Any other word after a number belongs to the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

# Units, separated by |: dimension, factor to the dimension's base unit, names. A "*" allows the metric prefixes.
_TABLE = """
length 1 m* meter* metre* 米 | length 1000 公里 千米 | length 0.1 分米 | length 0.01 厘米 公分 | length 0.001 毫米
length 0.0254 in inch inches 英寸 | length 0.3048 ft foot feet 英尺 | length 0.9144 yd yard 码
length 1609.344 mi mile 英里 | mass 1 g* gram* 克 | mass 1000 公斤 千克 | mass 500 斤 | mass 0.001 毫克
mass 1000000 tonne ton 吨 | mass 453.59237 lb lbs 磅 | mass 28.349523125 oz ounce 盎司 | time 1 s* sec second* 秒 秒钟
time 0.001 毫秒 | time 60 min minute 分钟 | time 3600 h hr hour 小时 个小时 | time 86400 day 天
time 604800 wk week 周 星期 个星期 | calendar 1 month 个月 | calendar 12 yr year 年 | volume 1 L* l* liter* litre* 升 公升
volume 0.001 毫升 | volume 3.785411784 gal gallon 加仑 | angle 1 ° deg degree 度 | radian 1 rad radian 弧度
celsius 1 °C degC celsius 摄氏度 | fahrenheit 1 °F degF fahrenheit 华氏度 | kelvin 1 K kelvin 开尔文
frequency 1 Hz* hertz* 赫兹 | force 1 N* newton* 牛顿 牛 | energy 1 J* joule* 焦耳 焦 | energy 4.184 cal calorie 卡路里
energy 4184 kcal 千卡 大卡 | power 1 W* watt* 瓦 瓦特 | power 1000 千瓦 | voltage 1 V* volt* 伏 伏特
current 1 A* amp* ampere* 安培 安 | resistance 1 Ω* ohm* 欧姆 | charge 1 C coulomb* 库仑 | pressure 1 Pa* pascal* 帕
pressure 101325 atm atmosphere | amount 1 mol* mole* 摩尔 | data 1 byte* | data 1 B | data 1000 KB kB
data 1000000 MB | data 1000000000 GB | data 1000000000000 TB | pixel 1 px pixel 像素 | decibel 1 dB decibel 分贝
speed 1 mph | rotation 1 rpm | area 10000 ha hectare 公顷 | acre 1 acre 英亩 | USD 1 $ usd dollar 美元
USD 0.01 ¢ cent 美分 | EUR 1 € eur euro 欧元 | GBP 1 £ gbp 英镑 | CNY 1 rmb cny yuan 元 块 块钱 人民币 | JPY 1 jpy yen 日元
yen 1 ¥ | INR 1 ₹ inr rupee 卢比 | KRW 1 ₩ krw won 韩元 | person 1 person people persons 人 名 位
time_counted 1 times 次 | point 1 pt point | piece 1 piece pcs 只 件 块儿 | item 1 item
"""
_PREFIXES = {
    "k": 3, "h": 2, "d": -1, "c": -2, "m": -3, "μ": -6, "n": -9, "M": 6, "G": 9, "T": 12,
    "kilo": 3, "centi": -2, "milli": -3, "micro": -6, "nano": -9, "mega": 6, "giga": 9,
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """Powers of dimensions, and the factor to their base units."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction
    glued_letter: bool = False
    """One letter directly after the number, as in "5m" and "12C". It may be a variable or a label."""


def _read_table() -> dict[str, tuple[str, Fraction]]:
    table: dict[str, tuple[str, Fraction]] = {}
    for row in re.split(r"\||\n", _TABLE.strip()):
        dimension, factor, *names = row.split()
        for entry in names:
            name = entry.rstrip("*")
            forms = {name: Fraction(factor)}
            if entry.endswith("*"):
                long = len(name) > 3
                forms |= {
                    p + name: Fraction(factor) * Fraction(10) ** n for p, n in _PREFIXES.items() if (len(p) > 1) == long
                }
            if name.isascii() and len(name) > 2 and name.islower():
                forms |= {form + "s": value for form, value in forms.items() if not form.endswith("s")}
            for form, value in forms.items():
                table.setdefault(form, (dimension, value))
    return table


_UNITS = _read_table()
_ANY_CASE: dict[str, tuple[str, Fraction] | None] = {}
for _name, _unit in _UNITS.items():  # "KM" is km, but "Mw" may be mW and MW
    _ANY_CASE[_name.casefold()] = _unit if _ANY_CASE.get(_name.casefold(), _unit) == _unit else None
_CHINESE = "|".join(sorted((name for name in _UNITS if "\u3400" <= name[0] <= "\u9fff"), key=len, reverse=True))
_PART = re.compile(
    r"\s*(?:(?P<before>square|cubic|sq\.?|cu\.?|平方|立方)\s*)?"
    rf"(?P<name>(?:°|\bdeg(?:rees?)?\b)\s*(?P<scale>[CF]\b|celsius\b|fahrenheit\b)|[°$€£¥¢₹₩]|[A-Za-zμΩ]+|{_CHINESE})"
    r"(?:\^\{?(?P<power>-?[1-4])\}?|(?P<digit>[23])(?!\d)|\s+(?P<after>squared|cubed)\b)?",
    re.I,
)
_PER = re.compile(r"\s*(?:/|\bper\b|每)\s*", re.I)
_TIMES = re.compile(r"\s*[·*×]\s*")


def read_unit(text: str) -> tuple[Unit, int] | None:
    """Return the unit at the start of a text ("km/h", "square meters", "平方米"), and where it ends; else None."""
    dimensions: dict[str, int] = {}
    factor, end, sign = Fraction(1), 0, 1
    start = 0
    while part := _PART.match(text, start):
        name = "°" + part["scale"][0].upper() if part["scale"] else part["name"]
        known = _UNITS.get(name) or (_ANY_CASE.get(name.casefold()) if len(name) > 1 else None)
        if known is None or (name == "in" and not re.match(r"\s*(?:[.,;)^]|$)", text[part.end() :])):
            break
        size = {"s": 2, "c": 3, "平": 2, "立": 3}.get((part["before"] or part["after"] or " ")[0].lower(), 1)
        if part["after"]:
            size = 2 if part["after"].lower() == "squared" else 3
        power = sign * int(part["power"] or part["digit"] or size)
        dimension, value = known
        for base, exponent in {"volume": (("length", 3),), "speed": (("length", 1), ("time", -1)),
                               "area": (("length", 2),)}.get(dimension, ((dimension, 1),)):  # fmt: skip
            dimensions[base] = dimensions.get(base, 0) + exponent * power
        value *= {"volume": Fraction(1, 1000), "speed": Fraction("0.44704")}.get(dimension, 1)
        factor, end = factor * value**power, part.end()
        if joint := _PER.match(text, end):
            sign, start = -1, joint.end()
        elif joint := _TIMES.match(text, end):
            start = joint.end()
        else:
            break
    if not end:
        return None
    glued = end == 1 and text[0].isascii() and text[0].isalpha()
    return Unit(tuple(sorted((d, n) for d, n in dimensions.items() if n)), factor, glued), end
