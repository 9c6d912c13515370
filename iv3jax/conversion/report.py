"""What a conversion reports, of the model and of each layer: as JSON, as lines for a terminal, as a page.

The page is HTML that needs nothing else: inline style, inline SVG, no script. Nothing is measured here.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from iv3jax.conversion import plots


@dataclass(frozen=True)
class LayerReport:
    """One converted layer. Shares and relative errors are fractions: 0.01 is 1 %.

    Attributes:
        layer: number of the layer, from 0.
        rank: dims of its latent.
        query_norm_residual, key_norm_residual: share of the normed queries' or keys' energy that the affine
            substitute misses; None where nothing was fitted.
        rope_energy: share of the keys' energy, weighted by the queries, that the shared RoPE key keeps.
        logit_error: share of the attention logits' variance, weighted by the softmax, that is missed after
            the positional split; None where it was not measured.
        energies: the spectrum in the method's metric, in its units, descending.
        lost: share of the spectrum that lies beyond the rank.
        output_error: squared error of the attention's output on calibration tokens, relative to its energy.
    """

    layer: int
    rank: int
    query_norm_residual: float | None
    key_norm_residual: float | None
    rope_energy: float
    logit_error: float | None
    energies: tuple[float, ...]
    lost: float
    output_error: float


@dataclass(frozen=True)
class Report:
    """A whole conversion. It lies in the output, whose bytes do not depend on time or place.

    Attributes:
        source: the model folder.
        method: iv3, transmla, care or svd.
        settings: all that was asked for, in JSON's types.
        text_tokens, vision_tokens: what the calibration saw, padding not counted.
        dropped: calibration samples that were left out, being longer than a row.
        ranks: of each layer, in dims.
        rope_dim: dims of the shared RoPE key.
        cache_bytes_source, cache_bytes: of one token over all layers in bf16, before and after; the source's
            is above 0.
        parameters_source, parameters: how many numbers the models have, before and after.
        log_perplexity_source, log_perplexity: mean −log p in nats of the held-out tokens, before and after;
            None where it was not measured.
        held_out_tokens: tokens of the calibration windows that were kept aside for that.
        layers: at least one.
    """

    source: str
    method: str
    settings: dict[str, Any]
    text_tokens: int
    vision_tokens: int
    dropped: tuple[str, ...]
    ranks: tuple[int, ...]
    rope_dim: int
    cache_bytes_source: int
    cache_bytes: int
    parameters_source: int
    parameters: int
    log_perplexity_source: float | None
    log_perplexity: float | None
    held_out_tokens: int
    layers: tuple[LayerReport, ...]


def to_json(report: Report) -> str:
    """All fields by their names, a line for each field and each layer; a number that is not finite is null.

    Tuples are lists.
    """
    body = _finite(asdict(report))
    fields = {name: json.dumps(value, allow_nan=False) for name, value in body.items()}
    layers = (json.dumps(layer, allow_nan=False) for layer in body["layers"])
    fields["layers"] = "[\n    " + ",\n    ".join(layers) + "\n  ]"
    return "{\n" + ",\n".join(f'  "{name}": {value}' for name, value in fields.items()) + "\n}\n"


def summary(report: Report) -> str:
    """Six to ten lines for the terminal."""
    low, high = min(report.ranks), max(report.ranks)
    mean = sum(report.ranks) / len(report.ranks)
    ranks = f"{low}" if low == high else f"{low} to {high}, mean {mean:.1f}"
    lines = [
        f"{report.source}: {_converted(report)}",
        f"cache: {_cache(report)} bytes a token ({_cache_share(report)})",
        f"latent: rank {ranks}; {report.rope_dim} dims with RoPE",
        f"parameters: {_millions(report.parameters_source)} → {_millions(report.parameters)}",
        f"calibration: {report.text_tokens:,} text and {report.vision_tokens:,} vision tokens"
        + (f"; {_count(len(report.dropped), 'sample')} too long and left out" if report.dropped else ""),
    ]
    norms = [("query_norm_residual", "the queries' energy"), ("key_norm_residual", "the keys'")]
    if fits := [_spread(report, name, what) for name, what in norms if _known(report, name)]:
        lines.append(f"norm fit misses {', '.join(fits)}")
    kept = _spread(report, "rope_energy", "the keys' energy", worst=min)
    lines.append(f"RoPE key keeps {kept}")
    if _known(report, "logit_error"):
        missed = _spread(report, "logit_error", "the logits' variance")
        lines.append(f"positional split misses {missed}")
    lines.append(f"output error: {_spread(report, 'output_error', 'the energy')}")
    if _has_perplexity(report):
        lines.append(
            f"log-perplexity on {report.held_out_tokens:,} held-out tokens: {_log_perplexities(report)}"
        )
    return "\n".join(lines)


def page(report: Report) -> str:
    """One HTML page with the plots and all their numbers."""
    name = escape(report.source)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Conversion: {name}</title>
<style>{_STYLE}{plots.STYLE}</style>
</head>
<body>
<main>
<h1>{name}</h1>
<p>{escape(_converted(report))}</p>
{_tiles(report)}
<div class="plots">
{_figures(report)}</div>
<h2>Layers</h2>
{_layer_table(report)}
<h2>Settings</h2>
{_settings_table(report)}
{_dropped(report)}</main>
</body>
</html>
"""


# The words and numbers around the plots.


def _tiles(report: Report) -> str:
    """The big numbers, before → after."""
    rows = [("Cache, bytes per token", _cache(report), _cache_share(report))]
    if _has_perplexity(report):
        big = " → ".join(map(_perplexity, (report.log_perplexity_source, report.log_perplexity)))
        note = f"log-perplexity {_log_perplexities(report)}"
        rows.append((f"Perplexity, {report.held_out_tokens:,} held-out tokens", big, note))
    parameters = f"{_millions(report.parameters_source)} → {_millions(report.parameters)}"
    share = f"{_percent(report.parameters / report.parameters_source)} of before"
    rows.append(("Parameters", parameters, share))
    tiles = (
        f"<div><dt>{what}</dt><dd><b>{big}</b><span>{note}</span></dd></div>" for what, big, note in rows
    )
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _figures(report: Report) -> str:
    """The plots; one that would show nothing is left out."""
    layers = [layer.layer for layer in report.layers]
    norms = {"queries": "query_norm_residual", "keys": "key_norm_residual"}
    fits = {what: _column(report, name) for what, name in norms.items() if _known(report, name)}
    figures = []
    if fits:
        note = "What the affine substitute of the q/k norms misses, on calibration tokens."
        caption = plots.Caption("norm", "Residual of the norm fit", note, "missed energy (%)")
        figures.append(plots.lines(caption, layers, fits))
    note = "The part of the keys, as the queries see them, that keeps its position."
    caption = plots.Caption("rope", "Energy kept by the RoPE key", note, "kept energy (%)")
    figures.append(plots.lines(caption, layers, {"keys": _column(report, "rope_energy")}, top=100))
    note = f"Dims of the latent, which the cache holds beside the {report.rope_dim} of the RoPE key."
    caption = plots.Caption("rank", "Rank", note, "rank (dims)")
    figures.append(plots.bars(caption, layers, [layer.rank for layer in report.layers]))
    if curves := [_curve(layer) for layer in report.layers if 0 < sum(layer.energies) < math.inf]:
        note = "Directions in the method's metric, the most important first; those beyond the rank are lost."
        caption = plots.Caption("spectrum", "Spectrum and rank", note, "share of the layer's energy")
        figures.append(plots.spectra(caption, curves))
    note = "Squared error of the attention's output on calibration tokens, relative to its energy."
    caption = plots.Caption("output", "Output error", note, "relative squared error (%)")
    figures.append(plots.lines(caption, layers, {"output": _column(report, "output_error")}))
    return "".join(figures)


def _curve(layer: LayerReport) -> plots.Curve:
    """Energies as shares of their sum: every layer has a scale of its own."""
    total = sum(layer.energies)
    about = f"layer {layer.layer}: rank {layer.rank:,}, {_percent(layer.lost)} beyond it"
    return plots.Curve(layer.layer, [energy / total for energy in layer.energies], layer.rank, about)


def _layer_table(report: Report) -> str:
    """All numbers of the plots, the spectra by how many of their directions hold most of the energy."""
    columns = [
        ("layer", [str(layer.layer) for layer in report.layers]),
        ("rank", [f"{layer.rank:,}" for layer in report.layers]),
        ("query norm missed", _percents(report, "query_norm_residual")),
        ("key norm missed", _percents(report, "key_norm_residual")),
        ("RoPE key keeps", _percents(report, "rope_energy")),
        ("logits missed", _percents(report, "logit_error")),
        ("directions for 90 % of the energy", [_directions(layer, 0.9) for layer in report.layers]),
        ("directions for 99 %", [_directions(layer, 0.99) for layer in report.layers]),
        ("energy beyond the rank", _percents(report, "lost")),
        ("output error", _percents(report, "output_error")),
    ]
    columns = [(head, cells) for head, cells in columns if set(cells) != {_UNKNOWN}]
    heads = "".join(f'<th scope="col">{head}</th>' for head, _ in columns)
    rows = zip(*(cells for _, cells in columns), strict=True)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    table = f"<table><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return f'<div class="wide" role="region" aria-label="Layers" tabindex="0">{table}</div>'


def _settings_table(report: Report) -> str:
    rows = [
        ("calibration tokens", f"{report.text_tokens:,} text, {report.vision_tokens:,} vision"),
        ("held-out tokens", f"{report.held_out_tokens:,}"),
        ("dims with RoPE", report.rope_dim),
        # The method is under the title.
        *((name, value) for name, value in report.settings.items() if name != "method"),
    ]
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_setting(value))}</td></tr>'
        for name, value in rows
    )
    return f'<table class="settings"><tbody>\n{body}\n</tbody></table>'


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_setting, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return _UNKNOWN if value is None else str(value)


def _dropped(report: Report) -> str:
    if not report.dropped:
        return ""
    items = "".join(f"<li>{escape(name)}</li>" for name in report.dropped)
    return (
        f"<details><summary>{_count(len(report.dropped), 'calibration sample')} too long and left out"
        f"</summary><ul>{items}</ul></details>\n"
    )


_UNKNOWN = "–"


def _converted(report: Report) -> str:
    return f"{_count(len(report.layers), 'layer')} converted to M²LA by {report.method}"


def _percent(share: float | None) -> str:
    if share is None:
        return _UNKNOWN
    return f"{100 * share:.3g} %" if abs(share) < 10 else f"{100 * share:,.0f} %"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _millions(n: int) -> str:
    return f"{n / 1e6:,.4g} M" if n < 1e9 else f"{n / 1e9:,.4g} B"


def _cache(report: Report) -> str:
    return f"{report.cache_bytes_source:,} → {report.cache_bytes:,}"


def _cache_share(report: Report) -> str:
    return f"{_percent(report.cache_bytes / report.cache_bytes_source)} of before"


def _has_perplexity(report: Report) -> bool:
    return report.log_perplexity_source is not None or report.log_perplexity is not None


def _perplexity(log: float | None) -> str:
    if log is None:
        return _UNKNOWN
    # A conversion that went wrong can be too bad for a plain number.
    return f"{math.exp(log):,.4g}" if log < 10 else f"e^{log:.1f}"


def _log_perplexities(report: Report) -> str:
    """`3.105 → 3.240 (+0.135)`."""
    before, after = report.log_perplexity_source, report.log_perplexity
    both = " → ".join(_UNKNOWN if value is None else f"{value:.3f}" for value in (before, after))
    return both if before is None or after is None else f"{both} ({after - before:+.3f})"


def _directions(layer: LayerReport, share: float) -> str:
    """The smallest rank that would keep this share of the layer's energy."""
    goal, kept = share * sum(layer.energies), 0.0
    if not goal > 0:
        return _UNKNOWN
    for n, energy in enumerate(layer.energies, 1):
        kept += energy
        if kept >= goal:
            return f"{n:,}"
    return _UNKNOWN


def _column(report: Report, name: str) -> list[float | None]:
    """A field of all layers."""
    return [getattr(layer, name) for layer in report.layers]


def _percents(report: Report, name: str) -> list[str]:
    return [_percent(share) for share in _column(report, name)]


def _known(report: Report, name: str) -> list[tuple[float, int]]:
    """A field's values that are not None, each with its layer."""
    values = ((getattr(layer, name), layer.layer) for layer in report.layers)
    return [(value, layer) for value, layer in values if value is not None]


def _spread(report: Report, name: str, what: str, worst: Callable[..., tuple[float, int]] = max) -> str:
    """`1.2 % of the energy (5.6 % in layer 3)`: the mean over the layers, and the worst one."""
    known = _known(report, name)
    mean = sum(value for value, _ in known) / len(known)
    broken = [pair for pair in known if not math.isfinite(pair[0])]
    value, layer = broken[0] if broken else worst(known)
    where = f" ({_percent(value)} in layer {layer})" if len(known) > 1 else ""
    return f"{_percent(mean)} of {what}{where}"


def _finite(value: Any) -> Any:
    """JSON has no word for a number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1d21; --soft: #5b5e66; --line: #e2e3e7; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171b; --ink: #eceef2; --soft: #a3a8b3; --line: #2f333b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.45 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.35rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 36px 0 8px; }
p { margin: 4px 0; color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 16px 40px; margin: 24px 0 32px; }
dt, dd span { display: block; color: var(--soft); font-size: .9rem; }
dd { margin: 0; }
dd b { font-size: 1.6rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.plots { display: grid; gap: 32px 40px; }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { min-width: 4.5rem; vertical-align: bottom; white-space: normal; color: var(--soft); }
th { font-weight: 500; }
.settings th, .settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
details { margin-top: 24px; }
"""
