(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const series = (index) => css(`--series-${index % 8}`);
  const smoothing = document.getElementById("smoothing");
  const axis = document.getElementById("axis");
  const search = document.getElementById("search");
  const dashes = ["solid", "dash", "dot", "dashdot"];
  const options = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]], plotlyServerURL: "" };
  const digits = (number) => number.toLocaleString("en-US");

  // -- the x axis: steps, samples or time spent, in the unit that suits the longest run

  const longest = [...data.curves, ...data.performance, ...data.machine].flatMap((figure) => figure.curves)
    .reduce((most, curve) => Math.max(most, curve.t[curve.t.length - 1] || 0), 0);
  const [seconds, unit] = [[86400, "days"], [3600, "hours"], [60, "minutes"], [1, "seconds"]]
    .find(([length]) => longest >= 2 * length || length === 1);
  const axisOf = (of) => (of === "machine" ? "time" : axis ? axis.value : "step");
  const places = (points, run, over) => {
    if (over === "time") return points.t.map((time) => time / seconds);
    if (over === "samples") return points.x.map((step) => step * data.runs[run].samples);
    return points.x;
  };
  const place = (mark, over) => places({ x: [mark.x], t: [mark.t] }, mark.run, over)[0];
  const xaxis = (over) => ({
    title: { text: over === "time" ? `time in attempts (${unit})` : over },
    gridcolor: css("--grid"), zeroline: false, linecolor: css("--line"),
    hoverformat: over === "time" ? ".2f" : ",.0f",
    unifiedhovertitle: { text: over === "time" ? `%{x} ${unit}` : `${over} %{x}` },
  });

  // -- curves

  // A moving average weighted by the distance between points along x, without bias towards the
  // start: a curve that is thinned or logged unevenly gives the same smoothed curve.
  const smoothed = (x, y, weight) => {
    const scale = 1000 / ((x[x.length - 1] - x[0]) || 1);
    let [sum, count, last] = [0, 0, x[0]];
    return y.map((value, i) => {
      if (value === null) return null;
      const kept = weight ** (Math.abs(x[i] - last) * scale);
      last = x[i];
      sum = sum * kept + value;
      count = count * kept + 1;
      return sum / count;
    });
  };
  const raw = (curve, over) => ({
    type: "scatter", name: curve.name, x: places(curve, curve.run, over), y: curve.y,
    legendgroup: curve.name,
    mode: curve.x.length > 60 ? "lines" : "lines+markers",
    line: { color: series(curve.color), dash: dashes[curve.dash % 4], width: curve.x.length > 60 ? 1.4 : 2 },
    marker: { size: curve.x.length > 1 ? 5 : 8 },
    hovertemplate: "%{y:.5~g}",
  });
  const smooth = (curve, over, weight) => {
    const points = curve.mean || curve;
    const x = places(points, curve.run, over);
    const drawn = raw(curve, over);
    return { ...drawn, x, y: smoothed(x, points.y, weight), mode: "lines", line: { ...drawn.line, width: 2 } };
  };
  const faint = (trace) => ({ ...trace, opacity: 0.28, hoverinfo: "skip", hovertemplate: null,
                              showlegend: false, mode: "lines", line: { ...trace.line, width: 1 } });
  const bad = (curve, over) => ({
    type: "scatter", mode: "markers", name: curve.name, yaxis: "y2", showlegend: false, cliponaxis: false,
    legendgroup: curve.name,
    x: places({ x: curve.bad.map((b) => b[0]), t: curve.bad.map((b) => b[1]) }, curve.run, over),
    y: curve.bad.map((b) => (b[2] === "inf" ? 1 : 0)),
    text: curve.bad.map((b) => `${b[2]} at step ${digits(b[0])}`),
    hovertemplate: "%{text}",
    marker: {
      color: series(curve.color), size: 8,
      symbol: curve.bad.map((b) => ({ NaN: "x-thin-open", inf: "triangle-up", "-inf": "triangle-down" })[b[2]]),
      line: { width: 2, color: series(curve.color) },
    },
  });
  const traces = (curve, over) => {
    const weight = smoothing ? Math.min(Math.sqrt(Number(smoothing.value)), 0.999) : 0;
    const line = raw(curve, over);
    const lines = weight > 0 ? [faint(line), smooth(curve, over, weight)] : [line];
    return curve.bad.length ? [...lines, bad(curve, over)] : lines;
  };
  const upright = (mark, over) => ({
    type: "line", xref: "x", yref: "paper", x0: place(mark, over), x1: place(mark, over), y0: 0, y1: 1,
    layer: "below",
    line: { width: 1, dash: "dot", color: mark.color === null ? css("--faint") : series(mark.color) },
  });
  const across = (level) => ({
    type: "line", xref: "paper", yref: "y", x0: 0, x1: 1, y0: level.y, y1: level.y, layer: "below",
    line: { width: 1, dash: "dash", color: data.runs.length > 1 ? series(level.run) : css("--faint") },
  });
  const note = (mark, over) => ({
    xref: "x", yref: "paper", x: place(mark, over), y: 1, xanchor: "left", yanchor: "top", showarrow: false,
    text: mark.label,
    font: { size: 10, color: css("--soft") }, hovertext: mark.text, captureevents: true,
  });
  const frame = () => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: css("--soft") },
    margin: { l: 48, r: 12, t: 30, b: 40 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--faint"), activecolor: css("--text") },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") } },
    yaxis: { gridcolor: css("--grid"), zeroline: false, automargin: true, tickformat: "~g",
             ticks: "outside", ticklen: 4, tickcolor: "rgba(0,0,0,0)" },
  });
  // Plotly draws a constant curve in a range of 2: an accuracy of 0.6 would be between -0.4 and 1.6.
  const aroundConstant = (figure) => {
    const values = figure.curves.flatMap((curve) => curve.y.filter((value) => value !== null));
    if (!values.length || values.some((value) => value !== values[0])) return {};
    const room = Math.abs(values[0]) / 10 || 0.1;
    return { range: [values[0] - room, values[0] + room] };
  };
  const layout = (figure, over, log) => {
    const base = frame();
    const marks = figure.marks.filter((mark) => place(mark, over) !== null);
    return {
      ...base, hovermode: "x unified", showlegend: figure.legend, uirevision: `${over} ${log}`,
      legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
      xaxis: xaxis(over),
      yaxis: { ...base.yaxis, ...(log || figure.levels ? {} : aroundConstant(figure)), type: log ? "log" : "linear", rangemode: figure.levels ? "tozero" : "normal",
               tickformat: figure.title.includes("bytes") ? "~s" : "~g" },
      yaxis2: { overlaying: "y", range: [0, 1], fixedrange: true, visible: false },
      shapes: [...marks.map((mark) => upright(mark, over)), ...(figure.levels || []).map(across)],
      annotations: marks.filter((mark) => mark.label).map((mark) => note(mark, over)),
    };
  };
  const drawCurves = (plot, figure) => {
    const over = axisOf(plot.dataset.of);
    const log = plot.parentElement.querySelector(".log").checked;
    return Plotly.react(plot, figure.curves.flatMap((curve) => traces(curve, over)),
                        layout(figure, over, log), options);
  };

  // -- histograms: the bars of one step, and all steps as a heat map

  const cumulated = (shown) => shown.counts.reduce((sums, count) => [...sums, sums[sums.length - 1] + count], [0]);
  const rebinned = (shown, low, high, bins) => {
    const sums = cumulated(shown);
    const width = (shown.high - shown.low) / shown.counts.length || 1e-12;
    const until = (value) => {
      const at = Math.min(Math.max((value - shown.low) / width, 0), shown.counts.length);
      const whole = Math.floor(at);
      return sums[whole] + (at - whole) * ((sums[whole + 1] ?? sums[whole]) - sums[whole]);
    };
    const edge = (i) => low + ((high - low) * i) / bins;
    const total = sums[sums.length - 1] || 1;
    return Array.from({ length: bins }, (_, i) =>
      (until(i === bins - 1 ? Infinity : edge(i + 1)) - (i ? until(edge(i)) : 0)) / total);
  };
  const bars = (shown, color) => {
    const width = (shown.high - shown.low) / shown.counts.length;
    return {
      type: "bar", y: shown.counts, width, marker: { color, line: { width: 0 } },
      x: shown.counts.map((_, i) => shown.low + width * (i + 0.5)), hovertemplate: "%{y:,} at %{x:.4~g}",
      name: "",
    };
  };
  const heat = (steps, color) => {
    const low = Math.min(...steps.map((shown) => shown.low));
    const high = Math.max(...steps.map((shown) => shown.high));
    const bins = 48;
    const columns = steps.map((shown) => rebinned(shown, low, high, bins));
    return {
      type: "heatmap", xaxis: "x2", yaxis: "y2", x: steps.map((shown) => shown.step), name: "",
      y: Array.from({ length: bins }, (_, i) => low + ((high - low) * (i + 0.5)) / bins),
      z: Array.from({ length: bins }, (_, i) => columns.map((column) => column[i])),
      colorscale: [[0, css("--card")], [1, color]], showscale: false,
      hovertemplate: "step %{x:,}<br>%{z:.1%} at %{y:.4~g}",
    };
  };
  const drawHistogram = (plot, found) => {
    const slider = plot.parentElement.querySelector("input");
    const shown = found.steps[slider ? Number(slider.value) : found.steps.length - 1];
    const color = series(found.run);
    const base = frame();
    const title = shown.bad ? `value (${digits(shown.bad)} not finite)` : "value";
    const one = { ...base, bargap: 0, showlegend: false, margin: { ...base.margin, t: 14 },
                  xaxis: { ...xaxis("step"), title: { text: title }, hoverformat: ".4~g" } };
    if (found.steps.length < 2) return Plotly.react(plot, [bars(shown, color)], one, options);
    return Plotly.react(plot, [bars(shown, color), heat(found.steps, color)], {
      ...one,
      xaxis: { ...one.xaxis, domain: [0, 0.46] },
      xaxis2: { ...xaxis("step"), domain: [0.58, 1], anchor: "y2", type: "category", nticks: 5,
                showgrid: false },
      yaxis2: { ...base.yaxis, anchor: "x2", showgrid: false, automargin: true },
      shapes: [{ type: "line", xref: "x2", yref: "paper", y0: 0, y1: 1,
                 x0: found.steps.indexOf(shown), x1: found.steps.indexOf(shown),
                 line: { width: 1, dash: "dot", color: css("--text") } }],
    }, options);
  };

  // -- Plotly figures that a run logged: unchanged, in the colours of the page

  const themed = (given) => {
    if (given.paper_bgcolor) return given;
    const base = frame();
    const template = given.template || {};
    const colors = { gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--line") };
    const own = template.layout || {};
    const clear = { bgcolor: "rgba(0,0,0,0)" };
    return {
      ...given, autosize: true, width: undefined, modebar: base.modebar,
      template: { ...template, layout: {
        ...own, paper_bgcolor: base.paper_bgcolor, plot_bgcolor: base.plot_bgcolor, font: base.font,
        xaxis: { ...own.xaxis, ...colors }, yaxis: { ...own.yaxis, ...colors },
        polar: { ...own.polar, ...clear }, ternary: { ...own.ternary, ...clear }, geo: { ...own.geo, ...clear },
      } },
    };
  };
  const drawDrawing = (plot, figure) => {
    if (figure.layout.height) plot.style.height = `${figure.layout.height}px`;
    const margin = { l: 56, r: 24, t: figure.layout.title ? 56 : 24, b: 48, ...figure.layout.margin };
    return Plotly.react(plot, figure.data, { ...themed(figure.layout), margin }, options);
  };

  // -- figures are drawn once they come into view

  const draws = { curves: drawCurves, performance: drawCurves, machine: drawCurves, histograms: drawHistogram, drawings: drawDrawing };
  const plots = all(".plot");
  const seen = new Set();
  const fail = (plot, error) => {
    plot.textContent = `Cannot draw this figure: ${error.message}`;
    plot.dataset.drawn = "failed";
    console.error(error);
  };
  const draw = (plot) => {
    const figure = data[plot.dataset.of][Number(plot.dataset.index)];
    plot.dataset.drawn = "no";
    try {
      draws[plot.dataset.of](plot, figure)
        .then(() => { plot.dataset.drawn = "yes"; })
        .catch((error) => fail(plot, error));
    } catch (error) {
      fail(plot, error);
    }
  };
  const refresh = (which = plots) => which.forEach((plot) => {
    if (seen.has(plot)) draw(plot);
    else delete plot.dataset.drawn;
  });
  const show = (plot) => { if (plot.dataset.drawn === undefined) draw(plot); };
  const watcher = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting) { seen.add(entry.target); show(entry.target); }
    else seen.delete(entry.target);
  }), { rootMargin: "400px" });
  plots.forEach((plot) => watcher.observe(plot));

  let asked = false;
  const refreshSoon = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; refresh(plots.filter((plot) => plot.dataset.of !== "drawings")); });
  };

  // -- when a loss was reached

  const two = (number) => String(number).padStart(2, "0");
  const spell = (time) => {
    if (time < 59.95) return `${time.toFixed(1)} s`;
    const [hours, minutes, rest] = [Math.floor(Math.round(time) / 3600), Math.floor(Math.round(time) / 60) % 60, Math.round(time) % 60];
    return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
  };
  const short = (number) => {
    const [, divisor, suffix] = [[1e3, 1, ""], [1e6, 1e3, "k"], [1e9, 1e6, "M"], [Infinity, 1e9, "G"]]
      .find(([limit]) => number < limit);
    return `${(number / divisor).toFixed(suffix ? 1 : 0)}${suffix}`;
  };
  const wanted = document.getElementById("wanted");
  const wantedOf = document.getElementById("wanted-of");
  const answer = (cell) => {
    const found = data.descents[wantedOf.value][Number(cell.dataset.run)];
    const value = wanted.valueAsNumber;
    if (Number.isNaN(value)) { cell.textContent = ""; return; }
    const at = found ? found.values.findIndex((loss) => loss <= value) : -1;
    cell.textContent = at < 0 ? "not reached" : spell(found.seconds[at]);
    if (at < 0) return;
    const about = document.createElement("span");
    about.className = "source";
    const tokens = found.tokens ? `, ${short(found.steps[at] * found.tokens)} tokens` : "";
    about.textContent = `step ${digits(found.steps[at])}${tokens}`;
    cell.append(about);
  };
  const answerAll = () => all(".answer").forEach(answer);
  if (wanted) {
    wanted.addEventListener("input", answerAll);
    wantedOf.addEventListener("change", answerAll);
  }

  // -- controls

  if (smoothing) smoothing.addEventListener("input", () => {
    smoothing.nextElementSibling.textContent = smoothing.value;
    refreshSoon();
  });
  if (axis) axis.addEventListener("change", refreshSoon);
  if (search) search.addEventListener("input", () => {
    const part = search.value.toLowerCase();
    all(".figure").forEach((figure) => {
      const names = figure.querySelector("h3").textContent.toLowerCase();
      figure.hidden = !names.includes(part);
    });
  });
  all(".log").forEach((input) => input.addEventListener("change", () =>
    draw(input.closest(".figure").querySelector(".plot"))));
  all(".steps input").forEach((input) => input.addEventListener("input", () => {
    const exhibit = input.closest(".exhibit");
    if (exhibit) turn(exhibit, input);
    else turnHistogram(input);
  }));
  const turn = (exhibit, input) => {
    const step = Number(input.dataset.steps.split(",")[Number(input.value)]);
    input.previousElementSibling.textContent = `step ${digits(step)}`;
    all(".frames", exhibit).forEach((frames) => {
      const newestFirst = all("figure", frames);
      const shown = newestFirst.find((figure) => Number(figure.dataset.step) <= step);
      newestFirst.forEach((figure) => { figure.hidden = figure !== shown; });
    });
  };
  const turnHistogram = (input) => {
    const plot = input.closest(".figure").querySelector(".plot");
    const shown = data.histograms[Number(plot.dataset.index)].steps[Number(input.value)];
    input.previousElementSibling.textContent = `step ${digits(shown.step)}`;
    draw(plot);
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => refresh());
  addEventListener("beforeprint", () => plots.forEach((plot) => { if (plot.offsetParent) show(plot); }));
  document.documentElement.dataset.ready = "yes";
})();
