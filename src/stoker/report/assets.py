"""The style and the script of a report's page. Nothing in them is fetched from anywhere."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --text: #1c1e21; --soft: #5d636b; --faint: #a3a8ae;
  --line: #e4e5e3; --grid: #eceeed; --marked: #fff6df; --accent: #2259b8;
  --good: #1b7a46; --live: #2259b8; --bad: #b3261e; --warn: #92600a;
  --series-0: #2563c9; --series-1: #d65f1e; --series-2: #16875a; --series-3: #8a4bbd;
  --series-4: #a87a00; --series-5: #c0396c; --series-6: #0c7d92; --series-7: #6b6f76;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131518; --card: #1a1d21; --text: #e6e8ea; --soft: #a1a8b0; --faint: #6d747c;
    --line: #2c3036; --grid: #262a2f; --marked: #362d14; --accent: #86b2ff;
    --good: #58c98b; --live: #86b2ff; --bad: #ff8a80; --warn: #e5b454;
    --series-0: #6ea8fe; --series-1: #ff9a5c; --series-2: #4cc38a; --series-3: #c195ef;
    --series-4: #e0b03c; --series-5: #f0749f; --series-6: #4fc3d6; --series-7: #a0a6b0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 76rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; font-weight: 650; overflow-wrap: anywhere; }
h2 {
  font-size: 1.05rem; font-weight: 650; margin: 2.75rem 0 .75rem; padding-bottom: .35rem;
  border-bottom: 1px solid var(--line);
}
h3 { font-size: .95rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
p { margin: .4rem 0; }
.soft { color: var(--soft); }
.title { display: flex; flex-wrap: wrap; gap: .4rem .9rem; align-items: baseline; }
.status { font-size: .8rem; font-weight: 600; white-space: nowrap; }
.status::before { content: "\\25CF"; margin-right: .35em; }
.finished { color: var(--good); } .running { color: var(--live); } .failed { color: var(--bad); }
.killed, .preempted, .interrupted { color: var(--warn); }
.error { color: var(--bad); white-space: pre-wrap; overflow-wrap: anywhere; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(9.2rem, 1fr)); gap: .75rem;
  margin-top: 1.5rem;
}
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.tile b {
  display: block; font-size: 1.3rem; white-space: nowrap; font-weight: 600;
  font-variant-numeric: tabular-nums; line-height: 1.35;
}
.tile span { display: block; color: var(--soft); font-size: .75rem; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
.figure {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .8rem 1rem .4rem; min-width: 0;
}
.figure:first-child { grid-column: 1 / -1; }
.figure header { display: flex; justify-content: space-between; gap: 1rem; align-items: baseline; }
.figure h3 span { color: var(--soft); font-weight: 400; font-size: .8rem; margin-left: .5em; }
.key {
  position: sticky; top: 0; z-index: 1; background: var(--page); padding: .3rem 0 .5rem; margin: 0;
  font-size: .875rem;
}
.key span:not(.swatch) { display: inline-block; margin-right: 1.4rem; }
.figure label { color: var(--soft); font-size: .8rem; white-space: nowrap; cursor: pointer; }
.figure label input { vertical-align: -2px; margin: 0 .3em 0 0; accent-color: var(--accent); }
.plot { height: 17rem; }
.figure:first-child .plot { height: 24rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem; white-space: nowrap; }
th, td { padding: .38rem 1.6rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: break-word; }
td code, td.notes { overflow-wrap: anywhere; white-space: pre-wrap; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { white-space: nowrap; font-weight: 500; width: 1%; }
tr.marked > td { background: var(--marked); }
tr.marked > td:first-child { box-shadow: -.5rem 0 0 var(--marked); }
.source { color: var(--soft); font-size: .78rem; margin-left: .6em; }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .5em; }
.swatch-0 { background: var(--series-0); } .swatch-1 { background: var(--series-1); }
.swatch-2 { background: var(--series-2); } .swatch-3 { background: var(--series-3); }
.swatch-4 { background: var(--series-4); } .swatch-5 { background: var(--series-5); }
.swatch-6 { background: var(--series-6); } .swatch-7 { background: var(--series-7); }
code, pre, .texts td {
  font: .8125rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
.texts td { white-space: pre-wrap; min-width: 8rem; overflow-wrap: anywhere; }
.texts td.number { min-width: 0; color: var(--soft); }
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem;
  margin: .5rem 0;
  max-height: 30rem; overflow: auto;
}
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--accent); font-size: .875rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .8rem; }
@media print { body { max-width: none; padding: 0; } .figure, .tile { break-inside: avoid; } }
"""


SCRIPT = """
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const switches = [...document.querySelectorAll(".figure input")];
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const series = (index) => css(`--series-${index % 8}`);

  const trace = (curve) => ({
    type: "scatter", name: curve.name, x: curve.x, y: curve.y,
    mode: curve.x.length > 60 ? "lines" : "lines+markers",
    line: { color: series(curve.color), dash: dashes[curve.dash % 4], width: curve.x.length > 60 ? 1.4 : 2 },
    marker: { size: curve.x.length > 1 ? 5 : 8 },
    hovertemplate: "%{y:.5~g}",
  });
  const line = (mark) => ({
    type: "line", xref: "x", yref: "paper", x0: mark.x, x1: mark.x, y0: 0, y1: 1, layer: "below",
    line: { width: 1, dash: "dot", color: mark.color === null ? css("--faint") : series(mark.color) },
  });
  const note = (mark) => ({
    xref: "x", yref: "paper", x: mark.x, y: 1, xanchor: "left", yanchor: "top", showarrow: false,
    text: mark.label,
    font: { size: 10, color: css("--soft") }, hovertext: mark.text, captureevents: true,
  });
  const layout = (figure, log) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: css("--soft") },
    margin: { l: 48, r: 8, t: 30, b: 40 }, hovermode: "x unified",
    showlegend: figure.legend,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--faint"), activecolor: css("--text") },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") } },
    legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    xaxis: { title: { text: "step" }, gridcolor: css("--grid"), zeroline: false, linecolor: css("--line"),
             hoverformat: ",d", unifiedhovertitle: { text: "step %{x}" } },
    yaxis: { type: log ? "log" : "linear", gridcolor: css("--grid"), zeroline: false, automargin: true,
             tickformat: "~g", ticks: "outside", ticklen: 4, tickcolor: "rgba(0,0,0,0)" },
    shapes: figure.marks.map(line), annotations: figure.marks.filter((mark) => mark.label).map(note),
  });
  const options = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]],
                    plotlyServerURL: "" };
  const draw = (index) => Plotly.react(
    plots[index], figures[index].curves.map(trace), layout(figures[index], switches[index].checked), options);
  const drawAll = () => plots.forEach((_, index) => draw(index));

  switches.forEach((input, index) => input.addEventListener("change", () => draw(index)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
})();
"""
