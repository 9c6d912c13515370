"""The report: JSON that comes back, plain lines, and a page that is whole whatever the numbers are."""

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from iv3jax.conversion.report import LayerReport, Report, page, summary, to_json


def make_layer(layer: int, rank: int = 24, **fields) -> LayerReport:
    energies = tuple(5 * 0.8**n for n in range(64))
    values = {"query_norm_residual": 0.01 / (layer + 1), "key_norm_residual": 0.05, "rope_energy": 0.9}
    values |= {"logit_error": 0.02, "energies": energies, "lost": sum(energies[rank:]) / sum(energies)}
    return LayerReport(layer, rank, **values | {"output_error": 0.03 + layer / 100} | fields)


def make_report(n: int = 4, **fields) -> Report:
    layers = tuple(make_layer(layer, 24 + layer) for layer in range(n))
    values = {
        "source": "models/source",
        "method": "iv3",
        "settings": {
            "method": "iv3",
            "rank": 24,
            "budget": None,
            "adapters": True,
            "calibration": ["a.txt", "b.jsonl"],
        },
        "text_tokens": 65536,
        "vision_tokens": 0,
        "dropped": (),
        "ranks": tuple(layer.rank for layer in layers),
        "rope_dim": 16,
        "cache_bytes_source": 1024,
        "cache_bytes": 512,
        "parameters_source": 134_515_008,
        "parameters": 130_000_000,
        "log_perplexity_source": 3.105,
        "log_perplexity": 3.24,
        "held_out_tokens": 4096,
        "layers": layers,
    }
    return Report(**values | fields)


def with_layers(**fields) -> Report:
    report = make_report()
    return replace(report, layers=tuple(replace(layer, **fields) for layer in report.layers))


def figures(html: str) -> dict[str, ET.Element]:
    """Title → the parsed SVG of each plot."""
    svgs = [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    return {svg.findtext("title", ""): svg for svg in svgs}


def texts(svg: ET.Element) -> list[str]:
    return [element.text or "" for element in svg.iter("text")]


def test_json_comes_back():
    report = make_report(dropped=("clip.jsonl:3 (9,000 tokens)",))
    expected = json.loads(json.dumps(asdict(report)))
    text = to_json(report)
    assert json.loads(text) == expected
    assert list(json.loads(text)) == [*Report.__dataclass_fields__]
    # A line for each layer, for whoever looks into the file.
    assert len([line for line in text.splitlines() if '"query_norm_residual"' in line]) == len(report.layers)


def test_json_has_no_words_that_json_lacks():
    report = replace(with_layers(output_error=math.nan, lost=math.inf), log_perplexity=math.nan)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = json.loads(to_json(report), parse_constant=refuse)
    assert found["log_perplexity"] is None and found["layers"][0]["lost"] is None


def test_the_page_has_all_plots_and_numbers():
    html = page(make_report())
    plots = figures(html)
    assert list(plots) == [
        "Residual of the norm fit",
        "Energy kept by the RoPE key",
        "Rank",
        "Spectrum and rank",
        "Output error",
    ]
    labels = ["missed energy (%)", "kept energy (%)", "rank (dims)", "share of the layer's energy"]
    for svg, label in zip(plots.values(), [*labels, "relative squared error (%)"], strict=True):
        assert svg.get("role") == "img" and svg.findtext("desc")
        names = {svg.find(tag).get("id") for tag in ("title", "desc")}
        assert names == set(svg.get("aria-labelledby", "").split())
        assert label in texts(svg) and {"layer", "direction (number)"} & set(texts(svg))
    assert len(plots["Rank"].findall("rect")) == 4
    assert len(plots["Spectrum and rank"].findall("circle")) == 4
    for number in ("1,024 → 512", "50 % of before", "22.31 → 25.53", "(+0.135)", "134.5 M"):
        assert number in html
    assert "queries</span>" in html and "keys</span>" in html
    # The worst layer's number is in the table; no column for what nobody measured.
    assert "<td>6 %</td>" in html and "logits missed" in html
    assert "logits missed" not in page(with_layers(logit_error=None))
    assert "http" not in html and "<script" not in html
    balance(html)


def balance(html: str) -> None:
    """Every element that is opened is closed, in order."""
    open_ones: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            if tag != "meta":
                open_ones.append(tag)

        def handle_startendtag(self, tag: str, attrs: list) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_ones.pop() == tag

    Parser().feed(html)
    assert open_ones == []


def test_text_is_escaped():
    evil = '<script>alert("x")</script>&'
    report = make_report(source=evil, method=evil, settings={evil: evil, "files": [evil]}, dropped=(evil,))
    html = page(report)
    assert "<script" not in html and html.count("&lt;script&gt;") == 7
    balance(html)


def test_settings_stand_beside_what_the_report_adds():
    html = page(make_report(settings={"calibration": ["a.txt", "b.txt"], "adapters": False, "seed": None}))
    assert "<td>a.txt, b.txt</td>" in html and "<td>off</td>" in html and "<td>65,536 text, 0 vision" in html
    assert ">method<" not in page(make_report())


@pytest.mark.parametrize(
    "report",
    [
        make_report(1),
        make_report(36),
        with_layers(energies=(0.0,) * 64, lost=0.0),
        with_layers(energies=()),
        with_layers(energies=(3.0,), rank=9),
        with_layers(energies=(3.0, 1e-30, 0.0), rank=3),
        with_layers(energies=(math.nan, 1.0)),
        with_layers(rope_energy=0.0, output_error=0.0, query_norm_residual=0.0, key_norm_residual=0.0),
        with_layers(rope_energy=1.0, output_error=1e-12),
        with_layers(output_error=123.4),
        with_layers(output_error=math.inf, rope_energy=math.inf),
        with_layers(query_norm_residual=None, logit_error=None),
        make_report(log_perplexity=1e4),
    ],
)
def test_unusual_numbers(report):
    html = page(report)
    balance(html)
    for svg in figures(html).values():
        for element in svg.iter():
            for name in {"x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "width", "height"} & set(
                element.keys()
            ):
                assert -1 <= float(element.get(name, "")) <= 421, (element.tag, name)
            for place in re.findall(r"[-\d.]+ [-\d.]+", element.get("d", "")):
                x, y = map(float, place.split())
                assert 48 <= x <= 408 and 32 <= y <= 206
    assert 6 <= len(summary(report).splitlines()) <= 10
    json.loads(to_json(report))


def test_without_energies_or_norms_there_is_no_plot_of_them():
    report = with_layers(energies=(0.0, 0.0), query_norm_residual=None, key_norm_residual=None)
    assert list(figures(page(report))) == ["Energy kept by the RoPE key", "Rank", "Output error"]
    assert "norm missed" not in page(report) and "directions for" not in page(report)


def test_a_layer_without_a_fit_is_a_gap():
    report = make_report()
    first, second, *rest = report.layers
    report = replace(report, layers=(first, replace(second, key_norm_residual=None), *rest))
    plot = figures(page(report))["Residual of the norm fit"]
    queries, keys = (path.get("d", "") for path in plot.findall("path"))
    assert (queries.count("M"), queries.count("L")) == (1, 3) and (keys.count("M"), keys.count("L")) == (2, 1)
    assert "<td>–</td>" in page(report)


def test_a_curve_ends_where_the_axis_does():
    """Below the axis there would be a flat line, as if the spectrum had levelled off."""
    report = with_layers(energies=(1.0, 1e-4, 1e-20, 1e-21), rank=3)
    plot = figures(page(report))["Spectrum and rank"]
    assert [path.get("d", "").count("L") for path in plot.findall("path")] == [1] * 4
    assert {circle.get("cy") for circle in plot.findall("circle")} == {"206.0"}


def test_perplexities_that_are_unknown_or_absurd():
    none = make_report(log_perplexity_source=None, log_perplexity=None)
    assert "erplexity" not in page(none) and "perplexity" not in summary(none)
    half = make_report(log_perplexity_source=None)
    assert "– → 25.53" in page(half) and "– → 3.240" in summary(half)
    assert "22.31 → e^10000.0" in page(make_report(log_perplexity=1e4))


def test_the_lines_for_the_terminal():
    assert summary(make_report(dropped=("clip.jsonl:3 (9,000 tokens)",))).splitlines() == [
        "models/source: 4 layers converted to M²LA by iv3",
        "cache: 1,024 → 512 bytes a token (50 % of before)",
        "latent: rank 24 to 27, mean 25.5; 16 dims with RoPE",
        "parameters: 134.5 M → 130 M",
        "calibration: 65,536 text and 0 vision tokens; 1 sample too long and left out",
        "norm fit misses 0.521 % of the queries' energy (1 % in layer 0), 5 % of the keys' (5 % in layer 3)",
        "RoPE key keeps 90 % of the keys' energy (90 % in layer 0)",
        "positional split misses 2 % of the logits' variance (2 % in layer 3)",
        "output error: 4.5 % of the energy (6 % in layer 3)",
        "log-perplexity on 4,096 held-out tokens: 3.105 → 3.240 (+0.135)",
    ]
    layers = (make_layer(0), make_layer(1, output_error=math.nan))
    assert "output error: nan % of the energy (nan % in layer 1)" in summary(make_report(layers=layers))
