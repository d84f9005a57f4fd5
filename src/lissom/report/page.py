"""The report as one HTML file that needs nothing else: figures first, then plots, then every recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

import plotly.graph_objects as go
import plotly.io

from lissom.evolve.measure import Measured
from lissom.evolve.optimize import ANSWER_TOKENS, Outcome, answer_seconds, costs
from lissom.report import peers
from lissom.report.results import cells

_COLOURS = ("#3b6ef5", "#e0701b", "#169b72", "#a34bd6", "#c9a400", "#d03d6c")
_GREY = "#8a93a3"
_PEER_HEADINGS = {"decode ratio": "lissom is faster by", "first": "first token", "first ratio": "lissom is sooner by"}
_PEERS_EXPLAINED = (
    "What one would run instead, measured in this run, in turns, each in a process of its own, on prompts of the "
    "documents' length, at its own generation loop. (The tables of recipes time transformers' <code>generate()</code>, "
    "which costs about a millisecond a token more.) Of a runtime's settings the fastest counts. transformers itself is "
    "the untouched model below. Memory is the peak of the process, loading included."
)


def page(outcome: Outcome, command: str) -> str:
    """The page's HTML.

    Args:
        command: how the recommended recipe is used.
    """
    plots = [pareto_plot(outcome), memory_plot(outcome), stage_plot(outcome)]
    parts = {
        "model": escape(outcome.base.recipe.model),
        "device": escape(outcome.profile.name),
        "cards": _cards(outcome),
        "verdict": _verdict(outcome),
        "command": escape(command),
        "recipe": escape(outcome.best.recipe.to_yaml()),
        "peers": _peers(outcome),
        "table": _table(outcome),
        "facts": measured_on(),
    }
    return filled("page.html", parts, plots)


def filled(template: str, parts: Mapping[str, str], plots: Sequence[go.Figure]) -> str:
    """A page of this package with its places filled in.

    Args:
        template: what the page has below what all have.
        parts: HTML, by the place's name.
        plots: of the places `plot0`, `plot1` and so on.
    """
    folder = files("lissom.report")
    whole = folder.joinpath("shell.html").read_text().replace("{{body}}", folder.joinpath(template).read_text())
    shown = dict(parts)
    for number, plot in enumerate(plots):
        shown[f"plot{number}"] = plotly.io.to_html(
            plot,
            full_html=False,
            include_plotlyjs=number == 0,
            div_id=f"plot{number}",
            config={"displaylogo": False, "responsive": True, "displayModeBar": False},
        )
    for name, text in shown.items():
        whole = whole.replace("{{" + name + "}}", text)
    return whole


def _family(m: Measured) -> str:
    keys = [key if key != "eviction" else str(settings.get("score", "snapkv")) for step in m.recipe.methods
            for key, settings in step.items()]  # fmt: skip
    return " + ".join(keys) or "no method"


def _colours(outcome: Outcome) -> dict[str, str]:
    names = sorted({_family(m) for m in outcome.measured} - {"no method"})
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)} | {"no method": _GREY}


def layout(title: str, x: str, y: str) -> go.Layout:
    """Of every plot."""
    return go.Layout(
        title={"text": title, "x": 0, "xanchor": "left", "font": {"size": 17}},
        xaxis={"title": x, "gridcolor": "#e6e9ef", "zeroline": False},
        yaxis={"title": y, "gridcolor": "#e6e9ef", "zeroline": False},
        font={"family": "system-ui, sans-serif", "color": "#27303f"},
        plot_bgcolor="white",
        paper_bgcolor="white",
        legend={"orientation": "h", "y": -0.22},
        margin={"l": 70, "r": 20, "t": 50, "b": 60},
        height=460,
        hoverlabel={"align": "left"},
    )


def _scatter(outcome: Outcome, figure: go.Figure, x: dict[int, float], y: dict[int, float]) -> None:
    """One marker per recipe, coloured by method; the front is filled, the chosen one ringed."""
    colours = _colours(outcome)
    for family, colour in colours.items():
        group = [m for m in outcome.measured if _family(m) == family]
        on_front = [any(m is other for other in outcome.front) for m in group]
        figure.add_scatter(
            x=[x[id(m)] for m in group],
            y=[y[id(m)] for m in group],
            mode="markers",
            name=family,
            marker={
                "size": [
                    20 if m is outcome.best else 13 if front else 9 for m, front in zip(group, on_front, strict=True)
                ],
                "color": colour,
                "opacity": [1.0 if front else 0.35 for front in on_front],
                "symbol": ["star" if m is outcome.best else "circle" for m in group],
                "line": {"width": 1, "color": "white"},
            },
            text=["<br>".join(f"{k}: {escape(v)}" for k, v in cells(m, outcome).items() if v) for m in group],
            hovertemplate="%{text}<extra></extra>",
        )


def pareto_plot(outcome: Outcome) -> go.Figure:
    """Quality loss against decode speed; the line joins what no other recipe beats in these two."""
    figure = go.Figure(
        layout=layout(
            "Speed against quality", "quality loss (%, lower is better)", "decode (tokens/s, higher is better)"
        )
    )
    x = {id(m): 100 * m.loss.estimate for m in outcome.measured}
    y = {id(m): 1 / outcome.profile.decode(m) for m in outcome.measured}
    line: list[Measured] = []
    for m in sorted(outcome.measured, key=lambda m: (x[id(m)], -y[id(m)])):
        if not line or y[id(m)] > y[id(line[-1])]:
            line.append(m)
    figure.add_scatter(
        x=[x[id(m)] for m in line],
        y=[y[id(m)] for m in line],
        mode="lines",
        line={"color": "#c3cad6", "width": 2, "shape": "hv"},
        name="front of these two",
        hoverinfo="skip",
    )
    _scatter(outcome, figure, x, y)
    figure.add_vline(
        x=100 * outcome.max_loss, line={"dash": "dot", "color": "#b04040"}, annotation_text="accepted loss"
    )
    return figure


def memory_plot(outcome: Outcome) -> go.Figure:
    """Bytes of weights and cache against quality loss."""
    figure = go.Figure(
        layout=layout("Memory against quality", "weights and KV cache (MB, log scale)", "quality loss (%)")
    )
    x = {id(m): m.memory / 1e6 for m in outcome.measured}
    y = {id(m): 100 * m.loss.estimate for m in outcome.measured}
    _scatter(outcome, figure, x, y)
    ticks = [step * 10.0**power for power in range(-6, 7) for step in (1, 2, 5)]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.add_hline(
        y=100 * outcome.max_loss, line={"dash": "dot", "color": "#b04040"}, annotation_text="accepted loss"
    )
    return figure


def stage_plot(outcome: Outcome) -> go.Figure:
    """Where the time of an answer goes: reading, what the method does to the cache, 64 tokens."""
    figure = go.Figure(layout=layout(f"Time by stage (document and {ANSWER_TOKENS} tokens)", "seconds", ""))
    shown = {id(m): m for m in (outcome.base, *sorted(outcome.front, key=lambda m: costs(m)[0]))}
    rows, device = list(shown.values())[::-1], outcome.profile
    names = [("★ " if m is outcome.best else "") + m.label for m in rows]
    stages = {
        "reading": [m.read / device.compute for m in rows],
        "compaction": [max(0.0, m.first_token - m.read) / device.compute for m in rows],
        f"{ANSWER_TOKENS} tokens": [ANSWER_TOKENS * device.decode(m) for m in rows],
    }
    for colour, (stage, seconds) in zip(("#9db7f9", "#e0701b", "#3b6ef5"), stages.items(), strict=True):
        figure.add_bar(y=names, x=seconds, name=stage, orientation="h", marker={"color": colour},
                       hovertemplate="%{y}<br>" + stage + ": %{x:.2f} s<extra></extra>")  # fmt: skip
    figure.update_layout(barmode="stack", height=140 + 34 * len(rows), margin={"l": 10})
    figure.update_layout(legend={"traceorder": "normal"})
    figure.update_yaxes(automargin=True)
    return figure


def _cards(outcome: Outcome) -> str:
    base, best, device = outcome.base, outcome.best, outcome.profile
    whole, before = answer_seconds(best, device), answer_seconds(base, device)
    speed = device.decode(base) / device.decode(best)
    first = device.first_token(base) / device.first_token(best)
    held = f"weights {best.weight_bytes / 1e6:.0f} of {base.weight_bytes / 1e6:.0f} MB, "
    held += f"KV cache {best.cache_bytes / 1e6:.1f} of {base.cache_bytes / 1e6:.1f} MB"
    facts = [
        (f"{before / whole:.2f}×", "speed of a whole answer", f"{whole:.1f} s: document and {ANSWER_TOKENS} tokens"),
        (f"{speed:.2f}×", "decode speed", f"{1 / device.decode(best):.1f} tokens/s"),
        (f"{first:.2f}×", "speed to the first token", f"{device.first_token(best):.2f} s"),
        (f"÷ {base.memory / best.memory:.1f}", "memory", held),
        (f"{best.loss.estimate:.1%}", "quality loss", f"accepted: {outcome.max_loss:.1%}"),
    ]
    return cards(facts)


def cards(facts: Sequence[tuple[str, str, str]]) -> str:
    """Large figures, each with what it is and a detail, as HTML."""
    return "".join(
        f'<div class="card"><b>{escape(figure)}</b><span>{escape(what)}</span><small>{escape(detail)}</small></div>'
        for figure, what, detail in facts
    )


def _verdict(outcome: Outcome) -> str:
    ending = "" if outcome.finished else " The search was stopped early: a second run goes on where it was."
    if outcome.untried:
        ending += f" Not tried yet: {escape(', '.join(outcome.untried))}."
    if outcome.failed:
        ending += f" Not measurable here: {escape(', '.join(outcome.failed))}."
    times = (
        "" if outcome.profile.measured else " Times are predicted from the device's measured rates, not measured on it."
    )
    if outcome.best is outcome.base:
        return f"No recipe was better than the untouched model within the accepted loss.{ending}{times}"
    return f"Recommended: <b>{escape(outcome.best.label)}</b>.{ending}{times}"


def _table(outcome: Outcome) -> str:
    rows = []
    for m in sorted(outcome.measured, key=lambda m: costs(m)[0]):
        kind = "best" if m is outcome.best else "front" if any(m is other for other in outcome.front) else "beaten"
        rows.append((kind, list(cells(m, outcome).values())))
    return html_table(list(cells(outcome.base, outcome)), rows)


def html_table(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table as HTML; each row with its kind: `best`, `front`, `beaten` or none."""
    above = "".join(f"<th>{escape(name)}</th>" for name in headings)
    lines = [
        f'<tr class="{kind}">{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>' for kind, values in rows
    ]
    return f"<table><thead><tr>{above}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _peers(outcome: Outcome) -> str:
    """The recommended recipe beside other runtimes, as a section; nothing where it was not compared."""
    comparison = outcome.peers
    if comparison is None:
        return ""
    parts = []
    for place, lines in peers.cells(comparison).items():
        rows = [
            (
                "" if number else "best",
                [f"{value}×" if value and "ratio" in name else value for name, value in line.items()],
            )
            for number, line in enumerate(lines)
        ]
        parts.append(f"<p>{escape(peers.title(comparison, *place))}</p>")
        parts.append(html_table([_PEER_HEADINGS.get(name, name) for name in lines[0]], rows))
    notes = [*comparison.notes, *(f"Not compared: {reason}" for reason in peers.unmeasured(comparison))]
    parts += [f'<p class="soft">{escape(note)}</p>' for note in notes]
    return f'<section><h2>Beside other runtimes</h2><p class="soft">{_PEERS_EXPLAINED}</p>{"".join(parts)}</section>'


def measured_on() -> str:
    """When, where and with what versions, as HTML."""
    from lissom.devices.machine import describe

    facts = describe()
    machine = facts["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return escape(
        f"Measured {facts['date']} on {machine['cpu']} ({machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['memory'] / 2**30:.0f} GiB; {' '.join(machine['flags'])}), {versions}."
    )
