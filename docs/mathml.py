"""Formulas as MathML, made when the site is built: a reader's browser fetches no script for them."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


def inline(translator, node) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block(translator, node) -> None:
    translator.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def setup(app) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True}
