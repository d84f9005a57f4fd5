"""`lissom check METHOD`: the method's claim, measured on this machine against its baselines."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command()(check)


def check(
    method: str = typer.Argument(..., help="attention-matching."),
    model: str = typer.Option("smollm2-135m", help="Asset, model folder, .gguf file or Hub id."),
    small: bool = typer.Option(False, "--small", help="Two documents, minutes."),
    paper: bool = typer.Option(False, "--paper", help="The size of the paper, for a GPU; unmeasured here."),
    journal: Path = typer.Option(
        Path("lissom-check/attention-matching.jsonl"),
        help="Where each measurement is kept; a killed run goes on there.",
    ),
    json_file: str = typer.Option(
        None, "--json", metavar="FILE", help="Write the result as JSON ('-': standard output)."
    ),
) -> None:
    """Reproduce a method's claim at the scale of this machine; a null result is shown as one."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    import lissom.models
    from lissom.errors import UserError
    from lissom.evals.checks import attention_matching as study
    from lissom.evals.stats import paired_bootstrap
    from lissom.report.rows import Claim, Result, Row

    if method != "attention-matching":
        raise UserError(f"There is no check for {method!r}. Known: attention-matching.")
    size = study.SMALL if small else study.PAPER if paper else study.DEFAULT
    errors, out = Console(stderr=True), Console()
    network, tokenizer = lissom.models.load(model)
    with Progress(console=errors) as bar:
        task = bar.add_task("measuring", total=None)
        records = study.measure(
            network, tokenizer, size, journal, lambda done, total: bar.update(task, completed=done, total=total)
        )
    rows = []
    for ratio in size.ratios:
        table = Table(
            "method", *study.METRICS, "NLL: ours - this [95 %]", "seconds", "bytes", title=f"{ratio:.0%} kept"
        )
        for arm in study.arms(ratio, size):
            means = {m: paired_bootstrap(study.per_question(records, ratio, arm, m)) for m in study.METRICS}
            own = [r for r in records if r["ratio"] == ratio and r["arm"] == arm]
            seconds = sum(r["read_seconds"] + r["fit_seconds"] for r in own) / len(own)
            share = sum(r["bytes"] for r in own) / sum(r["full_bytes"] for r in own)
            gap = study.against(records, ratio, arm, "nll")
            table.add_row(
                arm,
                *(f"{means[m].estimate:.3f}" for m in study.METRICS),
                "" if arm == study.OURS else f"{gap.estimate:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]",
                f"{seconds:.1f}",
                f"{share:.1%}",
            )
            for m, interval in means.items():
                ours = paired_bootstrap(study.per_question(records, ratio, study.OURS, m)).estimate
                n = len(study.per_question(records, ratio, arm, m))
                rows.append(
                    Row(f"{ratio}/{arm}/{m}", interval.estimate, "1", ours, None, interval.low, interval.high, n)
                )
            rows.append(Row(f"{ratio}/{arm}/seconds", seconds, "s", n=len(own)))
            rows.append(Row(f"{ratio}/{arm}/bytes", share, "of the full cache", n=len(own)))
        if json_file != "-":
            out.print(table)
    claims = [Claim(words, "arXiv 2602.16284", verdict) for words, verdict in study.verdicts(records, size)]
    if json_file != "-":
        known = [x for r in records if r["arm"] == study.OURS for x in r["full_recalled"] if x is not None]
        out.print(f"Planted strings recalled by the full cache: {sum(known) / len(known):.3f}")
        for claim in claims:
            out.print(f"{claim.verdict}: {claim.claim}")
    if json_file:
        Result("attention-matching", rows, claims).write(json_file)
