"""A merge report as one HTML file: no script, no font, no picture from elsewhere, and every text in it escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

from .report import MergeReport
from .report_svg import Bar, bars, columns

# Control characters, marks of the writing direction, and halves of characters, which no file in UTF-8 can hold.
_STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LAYERS, _ROWS = 60, 60  # bars of a picture; more could not be told apart
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 2rem auto; max-width: 64rem;
       padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #e4e4e4; vertical-align: top;
         overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdict { display: inline-block; padding: .15rem .7rem; border-radius: .3rem; color: #fff; font-weight: 600; }
.passed { background: #00734f; } .failed { background: #b3261e; }
tr.bad td { color: #b3261e; font-weight: 600; }
svg { max-width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #1c1c1c; }
.note { background: #f6f3e8; padding: .4rem .8rem; border-radius: .3rem; }
"""


def to_html(report: MergeReport) -> str:
    """The report as a page that stands alone: verdict, thresholds, figures, and pictures as inline SVG."""
    verdict = "passed" if report.passed else "failed"
    parts = [
        f"<h1>{escape(report.adapter)} merged into {escape(report.base)}</h1>",
        f'<p><span class="verdict {verdict}">{verdict}</span></p>',
        *(f'<p class="note">{escape(note)}</p>' for note in report.notes),
        _checks(report),
        _facts(report),
        _bakes(report),
        _metrics(report),
        _prompts(report),
        _histogram(report),
        _layers(report),
    ]
    title = escape(f"{report.adapter} merged: {verdict}")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = (
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{title}</title>\n<style>{_STYLE}</style>'
    )
    body = "\n".join(part for part in parts if part)
    page = f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], page)


def _checks(report: MergeReport) -> str:
    rows = [
        ([c.name, _figure(c.value), f"{c.relation} {c.limit:g}", "pass" if c.passed else "FAIL"], c.passed)
        for c in report.checks
    ]
    return _section("Verdict", _table(("figure", "measured", "threshold", ""), rows))


def _facts(report: MergeReport) -> str:
    members = [f"{m.weight:g} * {m.ref} ({m.digest[:12]})" for m in report.adapters]
    facts = [
        ("adapters", "\n".join(members) or report.adapter),
        ("base", f"{report.base} {report.base_origin}".strip()),
        ("fingerprint of the base", report.base_fingerprint),
        (
            "baked into",
            f"{report.bake} weights" + (f" of {report.quantization}" if report.quantization != "none" else ""),
        ),
        ("written as", report.to if report.to != "auto" else f"{report.dtype} (the types of the checkpoint)"),
        ("size", f"{report.bytes:,} bytes, {report.changed_tensors} of {report.tensors} tensors changed"),
        ("residual adapter", f"rank {report.residual_rank}" if report.residual_rank else ""),
        ("verified", _verified(report)),
        ("took", f"{report.seconds:.1f} s"),
        ("made", report.created),
        ("libraries", ", ".join(f"{name} {number}" for name, number in report.libraries.items())),
    ]
    return _section("What was merged", _table(("", ""), [([name, told], True) for name, told in facts if told]))


def _verified(report: MergeReport) -> str:
    how = {
        "loaded": "both models in memory, the merged one loaded by plain transformers",
        "streamed": "plain transformers' classes with weights streamed from the disk",
        "none": "tensors alone: no logits were compared",
    }
    return how.get(report.forward, report.forward)


def _bakes(report: MergeReport) -> str:
    rows = []
    for one in report.bakes:
        figures = [_figure(one.difference.mean_kl), f"{one.difference.top1_agreement:.1%}"]
        value = "" if one.value is None else f"{one.metric} {one.value:.1%} on {one.rows} rows"
        rows.append(([one.bake, *figures, value, "taken" if one.bake == report.bake else ""], True))
    heads = ("baked into", "mean KL (nats)", report.likeliest, "metric", "")
    return _section("Which weights to bake into, measured", _table(heads, rows)) if rows else ""


def _metrics(report: MergeReport) -> str:
    rows = []
    for m in report.metrics:
        ok = m.drop <= report.thresholds.max_metric_drop * (1 + 1e-9)
        count = f"{m.rows}" if m.rows == m.of_rows else f"{m.rows} of {m.of_rows}"
        rows.append(
            ([m.ref, m.metric, count, f"{m.reference:.2%}", f"{m.merged:.2%}", f"{m.merged - m.reference:+.2%}"], ok)
        )
    heads = ("version", "metric", "rows", "base + adapter", "merged", "difference")
    return _section("The tasks' own metrics", _table(heads, rows)) if rows else ""


def _prompts(report: MergeReport) -> str:
    if report.difference is None or not report.difference.rows:
        return ""
    rows = report.difference.rows
    shown = sorted(range(len(rows)), key=lambda i: -rows[i].kl)[:_ROWS]
    picture = columns(
        [rows[i].kl for i in shown], "KL of each prompt (nats a token), the largest first", report.thresholds.max_kl
    )
    table = [
        (
            [rows[i].text or f"prompt {i + 1}", str(rows[i].tokens), _figure(rows[i].kl), f"{rows[i].top1:.1%}",
             _figure(rows[i].max_logit), _figure(rows[i].mean_logit)],
            True,
        )
        for i in shown
    ]  # fmt: skip
    heads = ("prompt", "tokens", "KL", report.likeliest, "largest difference", "mean difference")
    return _section("Prompts", picture + _table(heads, table))


def _histogram(report: MergeReport) -> str:
    if report.difference is None or not report.difference.histogram:
        return ""
    counts = [
        Bar("below 1e-08" if low == 0 else f"from {low:.1e}", float(count))
        for low, count in report.difference.histogram
    ]
    total = sum(bar.value for bar in counts)
    shares = [Bar(bar.label, 100 * bar.value / total) for bar in counts]
    return _section("How far single logits are apart", bars(shares, "share of all logits (%)"))


def _layers(report: MergeReport) -> str:
    if not report.layers:
        return ""
    ordered = sorted(report.layers, key=lambda layer: (layer.lost is None, -layer.beyond))
    shown = ordered[:_LAYERS]
    made = [Bar(layer.tensor, layer.error, layer.limit) for layer in shown]
    more = f"<p>The {len(shown)} nearest to their limit, of {len(ordered)}.</p>" if len(ordered) > len(shown) else ""
    rows = [
        (
            [layer.tensor, layer.format, _figure(layer.error), _figure(layer.limit), _figure(layer.change),
             _figure(layer.lost), "" if layer.kept is None else f"{layer.kept:.1%}"],
            layer.error <= layer.limit,
        )
        for layer in shown
    ]  # fmt: skip
    heads = ("tensor", "stored as", "relative error", "limit", "change / base", "error / change", "change kept")
    picture = bars(made, "relative error of the stored tensor, log scale; a tick marks the limit", log=True)
    return _section("Tensors", more + picture + _table(heads, rows))


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}"


def _table(heads: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]]) -> str:
    """Rows of (cells, whether all is well)."""
    lines = []
    if any(heads):
        lines.append("<tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr>")
    for cells, good in rows:
        inner = "".join(f"<td>{escape(cell).replace(chr(10), '<br>')}</td>" for cell in cells)
        lines.append(f"<tr>{inner}</tr>" if good else f'<tr class="bad">{inner}</tr>')
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
