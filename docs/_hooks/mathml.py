"""Turns the formulas of a page into MathML when the site is built, so that no script is fetched to show them."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<body>.*?)</(?P=tag)>', re.DOTALL)


def on_page_content(text: str, **_: Any) -> str:
    """Return the page with every formula that arithmatex marked replaced by MathML."""
    return _FORMULA.sub(_replacement, text)


def _replacement(match: re.Match[str]) -> str:
    source = html.unescape(match["body"]).strip()
    display = source.startswith(r"\[")
    formula = re.sub(r"\s+", " ", source[2:-2]).strip().replace(r"\arg\min", r"\operatorname{argmin}")
    mathml = convert(formula, display="block" if display else "inline")
    if "\\" in mathml:
        raise ValueError(f"no MathML for a command in {formula!r}; say it in commands that latex2mathml knows.")
    return f'<div class="formula">{mathml}</div>' if display else mathml
