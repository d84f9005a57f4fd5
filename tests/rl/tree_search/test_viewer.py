from __future__ import annotations

import json
import re

from lissom.rl.tasks import Countdown
from lissom.rl.tree_search import SearchConfig, SymbolicCountdown, TreeSearch, root_of
from lissom.rl.tree_search.tree import to_dict
from lissom.rl.tree_search.viewer import _columns, page, write_page


def searched():
    problems = Countdown().problems("test", 2)
    return TreeSearch(SymbolicCountdown(), SearchConfig(simulations=40, close=True))([root_of(p) for p in problems])


def test_widths_of_steps_fit_into_those_above():
    for tree in searched():
        shown = _columns(to_dict(tree)["root"], tree)
        assert len(set(shown["ids"])) == len(shown["ids"]) == sum(1 for node in tree.root.below() if node.visits)
        below: dict[str, int] = {}
        for parent, value in zip(shown["parents"], shown["values"], strict=True):
            below[parent] = below.get(parent, 0) + value
        assert all(below.get(own, 0) <= value for own, value in zip(shown["ids"], shown["values"], strict=True))


def test_the_page_needs_nothing_else(tmp_path):
    trees = searched()
    html = page(trees, ["<3 5 7>"])
    assert "<html" in html[:100] and "plotly.js" in html
    assert not re.search(r"<(script|link)[^>]+(src|href)=", html)
    assert "prompt" in html and "visits" in html
    write_page(trees, tmp_path / "tree.html")
    assert (tmp_path / "tree.html").stat().st_size > 10_000
    json.dumps(to_dict(trees[0]))
