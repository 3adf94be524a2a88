"""The pieces of a self-contained page: style, tables, pictures as data URIs, numbers as people read them."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from PIL import Image

from datapipe.formats.image_formats import MOST_PIXELS

MOST_PICTURE_BYTES = 13_000_000
"""All pictures together, before base64 makes 4/3 of it: the report stays below 20 MB."""
LARGE_PICTURE_BYTES = 1_500_000
"""A picture above this is shrunk to WIDEST pixels and encoded anew."""
WIDEST = 1_800

RIGHT = ' class="n"'

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c1f24;--soft:#5b626d;--line:#dfe3e8;--box:#f5f7f9;--good:#117a46;
--bad:#b3362b}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e8eb;--soft:#9aa3ae;--line:#30363d;--box:#1d2126;
--good:#4cc38a;--bad:#ff8b7e}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem 1rem 4rem;max-width:62rem;background:var(--paper);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.4rem 0 .6rem;padding-bottom:.25rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0}.soft,figcaption,caption{color:var(--soft);font-size:.875rem}
.verdict{margin:1rem 0;padding:.8rem 1rem;background:var(--box);border-left:.3rem solid var(--soft);font-size:1.1rem}
.verdict.good{border-color:var(--good)}.verdict.bad{border-color:var(--bad)}
.missing{color:var(--soft);font-style:italic}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:.3rem}
th,td{text-align:left;vertical-align:top;padding:.25rem .9rem .25rem 0;border-bottom:1px solid var(--line)}
th{font-weight:600}thead th{vertical-align:bottom}
td.n,th.n{text-align:right;white-space:nowrap}tr.main td{font-weight:600}tr.grey td{color:var(--soft);font-style:italic}
table.facts th{color:var(--soft);font-weight:400;white-space:nowrap}table.facts td{overflow-wrap:anywhere}
pre{margin:.4rem 0;padding:.7rem .8rem;background:var(--box);overflow-x:auto;font-size:.8rem;line-height:1.45}
pre.wrap{white-space:pre-wrap;overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:1rem 0;font-size:.9rem}a{color:inherit}
summary{cursor:pointer;margin:.5rem 0}
figure{margin:.8rem 0}img{display:block;max-width:100%;height:auto}
.list img{min-width:44rem;max-width:none;width:100%}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(19rem,100%),1fr));gap:.8rem}
svg{display:block;width:100%;height:auto}.plots svg{max-width:32rem}.wide svg{min-width:32rem}
@media (max-width:30rem){body{padding:.8rem .7rem 3rem}h1{font-size:1.25rem}h2{margin-top:1.8rem}
table{font-size:.85rem}th,td{padding-right:.6rem}.wide svg{min-width:26rem}}
@media print{body{max-width:none;padding:0;font-size:10pt;--paper:#fff;--ink:#000;--soft:#444;--line:#bbb;--box:#f3f3f3}
nav{display:none}h2{break-after:avoid}figure,svg,tr,.verdict{break-inside:avoid}.scroll,pre{overflow:visible}
pre{white-space:pre-wrap}.list img,.wide svg{min-width:0}}
"""


def page(title: str, about: str, header: str, sections: Iterable[tuple[str, str]]) -> str:
    """The whole page; `header` and the content of the sections are HTML, everything else is text."""
    sections = list(sections)
    body = "\n".join(f'<section id="{_slug(name)}"><h2>{escape(name)}</h2>\n{content}\n</section>'
                     for name, content in sections)  # fmt: skip
    links = "\n".join(f'<a href="#{_slug(name)}">{escape(name)}</a>' for name, _ in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>\n"
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(about)}</p>\n{header}\n</header>\n'
        f'<nav aria-label="contents">\n{links}\n</nav>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


class Pictures:
    """Pictures as data URIs, within one budget. `read` returns None for what is not there."""

    def __init__(self, read: Callable[[str], bytes | None]) -> None:
        self._read, self._left = read, MOST_PICTURE_BYTES

    def figure(self, name: str, caption: str, kind: str = "scroll") -> str:
        """One JPEG of the run folder with its caption, or a line that says why there is none."""
        data = self._read(name)
        return missing(name) if data is None else self.embed(data, name, caption, kind)

    def embed(self, data: bytes, name: str, caption: str, kind: str = "scroll") -> str:
        """A JPEG that is, or is made of, the file `name` of the run folder."""
        try:
            data = _moderate(data)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return f'<p class="missing">{escape(name)} cannot be read.</p>'
        if len(data) > self._left:
            return f'<p class="missing">{escape(name)} is in the run folder; it would make this page too large.</p>'
        self._left -= len(data)
        image = f'<img src="data:image/jpeg;base64,{base64.b64encode(data).decode()}" alt="{escape(caption)}">'
        return f'<figure><div class="{kind}">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _moderate(data: bytes) -> bytes:
    """A JPEG of moderate size: large ones are shrunk."""
    if len(data) <= LARGE_PICTURE_BYTES:
        return data
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"a picture of {image.width} x {image.height}")
        smaller = image.convert("RGB")
    smaller.thumbnail((WIDEST, 2 * WIDEST))
    out = io.BytesIO()
    smaller.save(out, "JPEG", quality=80)
    return out.getvalue()


class TableRow(NamedTuple):
    """Cells of a table; `main` rows stand out, `grey` ones stand back."""

    cells: Sequence[str]
    main: bool = False
    grey: bool = False

    @property
    def kind(self) -> str:
        """As an attribute of the element."""
        name = "main" if self.main else "grey" if self.grey else ""
        return f' class="{name}"' if name else ""


def table(head: Sequence[str], rows: Iterable[TableRow], *, numbers: Sequence[int]) -> str:
    """A table that scrolls sideways on a narrow screen; the columns in `numbers` are aligned to the right."""
    lines = [f"<tr{row.kind}>{_cells('td', row.cells, numbers)}</tr>\n" for row in rows]
    body = f"<thead><tr>{_cells('th', head, numbers)}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in pairs)
    return f'<div class="scroll"><table class="facts"><tbody>\n{rows}</tbody></table></div>'


def details(summary: str, content: str) -> str:
    """`content` (HTML), folded away."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def soft(text: str) -> str:
    """A paragraph of explanation."""
    return f'<p class="soft">{escape(text)}</p>'


def missing(name: str) -> str:
    """The line in place of what a missing file would have shown."""
    return f'<p class="missing">Nothing to show: {escape(name)} is not in the run folder.</p>'


def percent(share: float) -> str:
    """.3756 -> "37.6 %"."""
    return f"{100 * share:.1f} %"


def count(number: int | None) -> str:
    """1234567 -> "1,234,567"; nothing for None."""
    return "" if number is None else f"{number:,}"


def escape(value: str) -> str:
    """Text, safe inside elements and attributes."""
    return html.escape(str(value), quote=True)


def _cells(tag: str, values: Sequence[str], numbers: Sequence[int]) -> str:
    kinds = [RIGHT if column in numbers else "" for column in range(len(values))]
    return "".join(f"<{tag}{kind}>{escape(value)}</{tag}>" for kind, value in zip(kinds, values, strict=True))
