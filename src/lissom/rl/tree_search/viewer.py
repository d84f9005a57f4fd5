"""A page that shows a tree, and needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lissom.files import atomic_path
from lissom.rl.tree_search.tree import Tree, to_dict


def page(trees: Sequence[Tree[Any]], titles: Sequence[str] = ()) -> str:
    """One page of HTML with each tree as a chart: widths are visits, colours mean rewards, and a step's figures are
    where the pointer is.

    Args:
        titles: of the trees, such as their prompts.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    shown = [*titles, *(f"tree {number}" for number in range(len(titles), len(trees)))]
    figure = make_subplots(len(trees), 1, specs=[[{"type": "domain"}]] * len(trees), subplot_titles=shown)
    for row, tree in enumerate(trees, 1):
        figure.add_trace(go.Icicle(**_columns(to_dict(tree)["root"], tree)), row, 1)
    figure.update_layout(height=60 + 420 * len(trees), margin={"t": 60, "l": 10, "r": 10, "b": 10})
    html: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return html


def write_page(trees: Sequence[Tree[Any]], file: Path, titles: Sequence[str] = ()) -> None:
    """The same as a file, whole or not at all."""
    with atomic_path(file) as temporary:
        temporary.write_text(page(trees, titles))


def _columns(root: dict[str, Any], tree: Tree[Any]) -> dict[str, Any]:
    """What plotly is told of each step that was visited."""
    ids, parents, labels, values, colours, words = [], [], [], [], [], []
    waiting: list[tuple[dict[str, Any], str, str]] = [(root, "0", "")]
    while waiting:
        node, own, parent = waiting.pop()
        ids.append(own)
        parents.append(parent)
        labels.append(node["step"].strip() or "prompt")
        values.append(node["visits"])
        colours.append(node["mean"] if node["mean"] is not None else tree.config.low)
        words.append(_words(node))
        inner = [(child, f"{own}/{number}") for number, child in enumerate(node["children"]) if child["visits"]]
        waiting += [(child, name, own) for child, name in inner]
    return {
        "ids": ids, "parents": parents, "labels": labels, "values": values, "text": words, "branchvalues": "total",
        "marker": {"colors": colours, "colorscale": "RdYlGn", "cmin": tree.config.low, "cmax": tree.config.high},
        "hovertemplate": "%{label}<br>%{text}<extra></extra>", "textinfo": "label", "tiling": {"orientation": "v"},
    }  # fmt: skip


def _words(node: dict[str, Any]) -> str:
    parts = [f"{node['visits']} visits"]
    for name, form in (("mean", ".3f"), ("best", ".3f"), ("prior", ".3f"), ("value", ".3f"), ("logp", ".2f")):
        if node[name] is not None:
            parts.append(f"{name} {node[name]:{form}}")
    if node["reward"] is not None:
        parts.append(f"ends with {node['reward']:.3f}")
    if node["closed"]:
        parts.append("nothing left below")
    return ", ".join(parts)
