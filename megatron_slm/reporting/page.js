// The script of a report: draws its charts and passages of text, and lets the reader choose what is shown.
//
// It is written by hand instead of with a chart library. The page must hold everything that it runs, so a library would
// be most of its weight; its charts must be readable without colour and by keyboard, which few libraries offer; and text
// of corpora must never become markup. Text is only ever set through textContent, and attributes through setAttribute.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const LABELLED = 6;      // curves up to which each carries its last value
  const FIRST_SHOWN = 8;   // runs that are shown at first
  const MARKS = 9;         // markers along a curve
  const TABLE_ROWS = 60;   // rows of a table of points
  const PANES = 4;         // steps side by side
  const LATE = 0.1;        // part of the axis that "without the start" leaves out

  const state = {
    shown: new Set(data.runs.map((_, run) => run).slice(0, FIRST_SHOWN)),
    axis: "tokens",
    late: false,
  };
  const drawn = [];        // functions that draw again after a change of the state

  // ---- Elements and numbers

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
    }
    element.append(...children.filter(child => child !== null));
    return element;
  }

  const html = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  function short(value) {
    const size = Math.abs(value);
    if (value === 0) return "0";
    for (const [unit, letter] of [[1e24, "Y"], [1e21, "Z"], [1e18, "E"], [1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (size >= unit) return `${trimmed(value / unit, 3)}${letter}`;
    }
    return size < 1e-3 ? value.toExponential(1).replace("-", "−") : trimmed(value, 3);
  }

  function trimmed(value, digits) {
    return String(Number(value.toPrecision(digits))).replace("-", "−");
  }

  function exact(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (Number.isInteger(value)) return value.toLocaleString("en").replace("-", "−");
    return size >= 1e6 || size < 1e-3 ? short(value) : value.toFixed(3).replace("-", "−");
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map(factor => factor * power).find(size => size >= raw * 0.999);
    const found = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step);
    return found;
  }

  // Returns the labels of an axis, all written in the same way.
  function tickWords(values) {
    const largest = Math.max(...values.map(Math.abs));
    return values.map(value => largest < 0.01 && value !== 0 ? value.toExponential().replaceAll("-", "−") : short(Number(value.toPrecision(9))));
  }

  // ---- What is shown

  const isShown = run => run === null || run === undefined || state.shown.has(run);

  // Returns the place of a step on the chosen axis, interpolated between the records that the page holds.
  function along(run, step) {
    const { step: steps, [state.axis]: values } = data.runs[run].clock;
    let low = 0, high = steps.length - 1;
    if (step >= steps[high]) return values[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    if (values[low] === null || values[high] === null) return null;
    return values[low] + (values[high] - values[low]) * (step - steps[low]) / (steps[high] - steps[low] || 1);
  }

  // Returns the shown curves of a chart with their points on the chosen axis.
  function shownCurves(chart) {
    const found = [];
    for (const curve of chart.curves) {
      if (!isShown(curve.run)) continue;
      const points = [];
      curve.x.forEach((step, index) => {
        const x = chart.xlabel || chart.categories.length || curve.run === null ? step : along(curve.run, step);
        if (x !== null) {
          points.push({ x, step, y: curve.y[index], low: curve.lowest?.[index], high: curve.highest?.[index] });
        }
      });
      if (points.some(point => point.y !== null)) found.push({ curve, points });
    }
    return found;
  }

  function apply() {
    for (const element of document.querySelectorAll("[data-run]")) element.hidden = !isShown(Number(element.dataset.run));
    for (const draw of drawn) draw();
  }

  // ---- Markers, swatches and hatches

  const SHAPES = {
    "o": "M-3.2,0a3.2,3.2 0 1,0 6.4,0a3.2,3.2 0 1,0 -6.4,0",
    "^": "M0,-4L3.8,3L-3.8,3Z",
    "v": "M0,4L3.8,-3L-3.8,-3Z",
    "s": "M-3,-3H3V3H-3Z",
    "D": "M0,-4.2L4.2,0L0,4.2L-4.2,0Z",
    "x": "M-3.2,-3.2L3.2,3.2M-3.2,3.2L3.2,-3.2",
  };
  const HATCHES = {
    "": "M0,0", "///": "M-1,1L1,-1M0,6L6,0M5,7L7,5", "...": "M2.4,3h1.2", "\\\\\\": "M-1,5L1,7M0,0L6,6M5,-1L7,1",
    "xxx": "M0,0L6,6M0,6L6,0", "---": "M0,3H6",
  };
  const look = index => data.looks[index % data.looks.length];
  const colour = index => `c${look(index)[0]}`;

  function mark(index, x, y) {
    return svg("path", { class: `mark ${colour(index)}`, d: SHAPES[look(index)[2]], transform: `translate(${x},${y})` });
  }

  function lineOf(index, d) {
    const dashes = look(index)[1];
    return svg("path", { class: `line ${colour(index)}`, d, "stroke-dasharray": dashes.length ? dashes.join(" ") : null });
  }

  function swatch(curve) {
    const picture = svg("svg", { width: 34, height: 12, "aria-hidden": "true" });
    if (curve.style !== "points") picture.append(lineOf(curve.look, "M0,6H34"));
    if (curve.style !== "plain") picture.append(mark(curve.look, 17, 6));
    return picture;
  }

  let patterns = 0;        // an id per pattern, because ids are shared by the whole document

  function hatched(index, parent) {
    const id = `hatch-${patterns++}`;
    const pattern = svg("pattern", { id, width: 6, height: 6, patternUnits: "userSpaceOnUse" },
      svg("path", { class: `hatch ${colour(index)}`, d: HATCHES[data.hatches[index % data.hatches.length]] }));
    parent.append(svg("defs", {}, pattern));
    return `url(#${id})`;
  }

  // ---- Charts of lines and points

  function frame(width, height, margin, scale, chart, xTicks, xTitle) {
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": chart.title });
    const yTicks = ticks(scale.low, scale.high, 5);
    const words = tickWords(yTicks);
    for (const [index, y] of yTicks.entries()) {
      picture.append(svg("path", { class: "grid", d: `M${margin.left},${scale.y(y)}H${width - margin.right}` }));
      picture.append(svg("text", { x: margin.left - 6, y: scale.y(y) + 4, "text-anchor": "end" }, words[index]));
    }
    for (const [x, words] of xTicks) {
      picture.append(svg("text", { x, y: height - margin.bottom + 16, "text-anchor": "middle" }, words));
    }
    picture.append(
      svg("path", { class: "frame", d: `M${margin.left},${margin.top}V${height - margin.bottom}H${width - margin.right}` }),
      svg("text", { x: 4, y: 12 }, chart.ylabel),
      svg("text", { x: width - margin.right, y: height - 4, "text-anchor": "end" }, xTitle),
    );
    return picture;
  }

  function extent(values, pad) {
    let low = Infinity, high = -Infinity;
    for (const value of values) {
      if (value === null || value === undefined) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (low === high) return [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
    return [low - pad * (high - low), high + pad * (high - low)];
  }

  function scaleOf(curves, chart, width, height, margin) {
    const all = curves.flatMap(({ points }) => points.filter(point => point.y !== null));
    let [first, last] = extent(all.map(point => point.x), 0);
    if (!chart.xlabel && first > 0) first = 0;
    const from = state.late && !chart.xlabel ? first + LATE * (last - first) : first;
    const inside = all.filter(point => point.x >= from);
    const [low, high] = extent((inside.length ? inside : all).flatMap(point => [point.y, point.low, point.high]), 0.06);
    return {
      from, last, low, high,
      x: value => margin.left + (value - from) / (last - from || 1) * (width - margin.left - margin.right),
      y: value => height - margin.bottom - (value - low) / (high - low) * (height - margin.top - margin.bottom),
    };
  }

  function pathOf(points, scale) {
    let d = "", open = false;
    for (const { x, y } of points) {
      if (y === null || x < scale.from) { open = false; continue; }
      d += `${open ? "L" : "M"}${scale.x(x).toFixed(1)},${scale.y(y).toFixed(1)}`;
      open = true;
    }
    return d;
  }

  function drawCurve(picture, { curve, points }, scale) {
    const inside = points.filter(point => point.y !== null && point.x >= scale.from);
    if (curve.lowest && inside.length > 1) {
      const at = (point, value) => `${scale.x(point.x).toFixed(1)},${scale.y(value).toFixed(1)}`;
      const upper = inside.map(point => at(point, point.high)), lower = inside.map(point => at(point, point.low)).reverse();
      picture.append(svg("path", { class: `band ${colour(curve.look)}`, d: `M${[...upper, ...lower].join("L")}Z` }));
    }
    if (curve.style !== "points") picture.append(lineOf(curve.look, pathOf(points, scale)));
    if (curve.style === "plain") return;
    if (curve.style === "points") {
      for (const point of inside) picture.append(mark(curve.look, scale.x(point.x).toFixed(1), scale.y(point.y).toFixed(1)));
      return;
    }
    // A few markers tell the curves apart without colour; a marker on every point would hide them.
    let next = -Infinity;
    const gap = (scale.x(scale.last) - scale.x(scale.from)) / MARKS;
    const offset = inside.length > MARKS ? (curve.look % 5) * gap / 5 : 0;
    inside.forEach((point, index) => {
      const x = scale.x(point.x);
      if (x >= next || index === inside.length - 1) {
        if (next === -Infinity && offset && index === 0) { next = x + offset; return; }
        picture.append(mark(curve.look, x.toFixed(1), scale.y(point.y).toFixed(1)));
        next = x + gap;
      }
    });
  }

  function labelEnds(picture, curves, scale, top, bottom) {
    const ends = curves.filter(({ curve }) => curve.style === "line").map(({ curve, points }) => {
      const last = points.findLast(point => point.y !== null);
      return { curve, last, y: scale.y(last.y) };
    }).sort((one, other) => one.y - other.y);
    let free = top;
    for (const end of ends) { end.place = Math.max(end.y, free); free = end.place + 13; }
    free = bottom;
    for (const end of ends.reverse()) { end.place = Math.min(end.place, free); free = end.place - 13; }
    for (const { curve, last, y, place } of ends) {
      const x = scale.x(last.x) + 6;
      if (Math.abs(place - y) > 4) {
        picture.append(svg("path", { class: `lead ${colour(curve.look)}`, d: `M${x - 4},${y}L${x},${place}` }));
      }
      picture.append(svg("text", { class: `end ${colour(curve.look)}`, x: x + 1, y: place + 4 }, short(last.y)));
    }
  }

  function plotLines(holder, chart) {
    const curves = shownCurves(chart);
    if (!curves.length) {
      const reason = state.axis === "flops" ? "No shown run has these values along FLOPs." : "No shown run has these values.";
      holder.append(html("p", { class: "missing" }, reason));
      return null;
    }
    const width = Math.max(280, Math.round(holder.clientWidth || 480)), height = Math.round(Math.min(340, Math.max(230, width * 0.6)));
    const labelled = curves.length <= LABELLED && curves.some(({ curve }) => curve.style === "line");
    const margin = { left: 50, right: labelled ? 54 : 14, top: 24, bottom: 38 };
    const scale = scaleOf(curves, chart, width, height, margin);
    const xTicks = ticks(scale.from, scale.last, width < 420 ? 4 : 6).map(x => [scale.x(x), short(x)]);
    const picture = frame(width, height, margin, scale, chart, xTicks, chart.xlabel || data.axes[state.axis]);
    for (const found of curves) drawCurve(picture, found, scale);
    if (labelled) labelEnds(picture, curves, scale, margin.top, height - margin.bottom);
    const cross = svg("path", { class: "cross", d: "" });
    picture.append(cross);
    const plot = html("div", { class: "plot", tabindex: 0, role: "slider" }, picture);
    const readout = html("p", { class: "readout" });
    holder.append(plot, legendOf(curves.map(({ curve }) => curve), swatch), readout);
    readByHand(plot, readout, cross, curves, scale, margin, chart, width, height);
    return curves;
  }

  function legendOf(curves, picture) {
    return html("ul", { class: "legend" }, ...curves.map(curve => html("li", {}, picture(curve), html("span", {}, curve.label))));
  }

  function nearest(points, x) {
    let best = null;
    for (const point of points) {
      if (point.y !== null && (best === null || Math.abs(point.x - x) < Math.abs(best.x - x))) best = point;
    }
    return best;
  }

  // Lets the reader read values with the pointer, or with the arrow keys as from a slider.
  function readByHand(plot, readout, cross, curves, scale, margin, chart, width, height) {
    const places = [...new Set(curves.flatMap(({ points }) => points.filter(p => p.y !== null && p.x >= scale.from).map(p => p.x)))]
      .sort((one, other) => one - other);
    let at = places.length - 1;
    const title = chart.xlabel || data.axes[state.axis];
    function show(index, visibly) {
      at = Math.min(Math.max(index, 0), places.length - 1);
      const x = places[at];
      const values = curves.map(({ curve, points }) => `${curve.label} ${exact(nearest(points, x)?.y)}`);
      const words = `${title} ${exact(x)}: ${values.join(" · ")}`;
      plot.setAttribute("aria-valuenow", at);
      plot.setAttribute("aria-valuetext", words);
      if (!visibly) return;
      readout.textContent = words;
      cross.setAttribute("d", `M${scale.x(x)},${margin.top}V${height - margin.bottom}`);
    }
    plot.setAttribute("aria-label", `Values of ${chart.title}`);
    plot.setAttribute("aria-valuemin", 0);
    plot.setAttribute("aria-valuemax", places.length - 1);
    show(at, false);
    plot.addEventListener("keydown", event => {
      const page = Math.max(1, Math.round(places.length / 10));
      const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -page, PageUp: page };
      const target = event.key === "Home" ? 0 : event.key === "End" ? places.length - 1 : at + (moves[event.key] ?? NaN);
      if (Number.isNaN(target)) return;
      event.preventDefault();
      show(target, true);
    });
    plot.addEventListener("pointermove", event => {
      const box = plot.getBoundingClientRect();
      const pixel = (event.clientX - box.left) / box.width * width;
      let best = 0;
      places.forEach((x, index) => { if (Math.abs(scale.x(x) - pixel) < Math.abs(scale.x(places[best]) - pixel)) best = index; });
      show(best, true);
    });
    plot.addEventListener("focus", () => show(at, true));
  }

  // ---- Charts of bars

  function plotBars(holder, chart) {
    const curves = shownCurves(chart);
    if (!curves.length) return null;
    const width = Math.max(280, Math.round(holder.clientWidth || 480)), height = 270;
    const margin = { left: 50, right: 10, top: 24, bottom: 38 };
    const [, top] = extent(curves.flatMap(({ points }) => points.map(point => point.y)), 0.08);
    const scale = { low: 0, high: top, y: value => height - margin.bottom - value / top * (height - margin.top - margin.bottom) };
    const each = (width - margin.left - margin.right) / chart.categories.length;
    const room = Math.max(1, Math.ceil(58 / each));
    const xTicks = chart.categories.map((words, index) => [margin.left + (index + 0.5) * each, index % room ? "" : words]);
    const picture = frame(width, height, margin, scale, chart, xTicks, chart.xlabel);
    const thick = each * 0.8 / curves.length;
    curves.forEach(({ curve, points }, number) => {
      const pattern = hatched(curve.look, picture);
      for (const { x: category, y } of points) {
        const x = margin.left + (category + 0.1) * each + number * thick;
        const box = { x, y: scale.y(y), width: Math.max(thick - 2, 1), height: Math.max(scale.y(0) - scale.y(y), 0) };
        picture.append(svg("rect", { ...box, class: `bar ${colour(curve.look)}`, fill: pattern }));
        if (thick > 32) {
          picture.append(svg("text", { x: x + thick / 2 - 1, y: box.y - 3, "text-anchor": "middle" }, trimmed(y, 2)));
        }
      }
    });
    const key = curve => {
      const small = svg("svg", { width: 24, height: 14, "aria-hidden": "true" });
      small.append(svg("rect", { x: 1, y: 1, width: 22, height: 12, class: `bar ${colour(curve.look)}`, fill: hatched(curve.look, small) }));
      return small;
    };
    holder.append(html("div", { class: "plot" }, picture), legendOf(curves.map(({ curve }) => curve), key));
    return curves;
  }

  // ---- Tables of points

  function tableOf(chart, curves) {
    const places = [...new Set(curves.flatMap(({ points }) => points.map(point => point.x)))].sort((one, other) => one - other);
    const every = Math.max(1, Math.ceil(places.length / TABLE_ROWS));
    const rows = places.filter((_, index) => index % every === 0 || index === places.length - 1);
    const maps = curves.map(({ points }) => new Map(points.map(point => [point.x, point.y])));
    const title = chart.categories.length ? "category" : chart.xlabel || data.axes[state.axis];
    const head = [title, ...curves.map(({ curve }) => curve.label)].map(words => html("th", { scope: "col" }, words));
    const body = rows.map(x => html("tr", {},
      html("th", { scope: "row" }, chart.categories.length ? chart.categories[x] : exact(x)),
      ...maps.map(values => html("td", {}, exact(values.get(x))))));
    const table = html("table", {}, html("thead", {}, html("tr", {}, ...head)), html("tbody", {}, ...body));
    const parts = [html("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Data of ${chart.title}` }, table)];
    if (every > 1) parts.unshift(html("p", {}, `${rows.length} of ${places.length} points; the CSV files hold all.`));
    return parts;
  }

  function setUpFigure(figure) {
    const chart = data.charts[figure.id];
    const holder = html("div");
    const fold = html("details", {}, html("summary", {}, "Data"));
    figure.append(holder, fold);
    let isNear = false, isStale = true, curves = null;
    function fillFold() {
      while (fold.children.length > 1) fold.lastChild.remove();
      if (fold.open && curves) fold.append(...tableOf(chart, curves));
    }
    // Charts far below are drawn when the reader comes near them, so that a page of many runs opens at once.
    function draw() {
      if (figure.hidden || !isNear) { isStale = true; return; }
      const hadFocus = holder.contains(document.activeElement);
      holder.replaceChildren();
      curves = chart.categories.length ? plotBars(holder, chart) : plotLines(holder, chart);
      fold.hidden = !curves;
      isStale = false;
      fillFold();
      if (hadFocus) holder.querySelector(".plot")?.focus();
    }
    fold.addEventListener("toggle", fillFold);
    drawn.push(draw);
    return { figure, come: () => { isNear = true; if (isStale) draw(); } };
  }

  // ---- Passages of text

  function choice(words, options, change) {
    const select = html("select", {}, ...options.map(([value, label]) => html("option", { value }, label)));
    select.addEventListener("change", () => change(Number(select.value)));
    return [html("label", {}, words, select), select];
  }

  function setUpPassages(holder, group) {
    const selective = group.losses.findIndex(of => of.selected.some(steps => steps.some(kept => kept !== null)));
    const here = { passage: 0, losses: Math.max(selective, 0), step: 0, token: 0, isSplit: false };
    const [runLabel, runSelect] = choice("Run", group.losses.map((of, index) => [index, data.runs[of.run].name]), value => {
      const step = losses().steps[here.step];
      here.losses = value;
      here.step = closest(losses().steps, step);
      render();
    });
    const [textLabel] = choice("Passage", group.texts.map(([title], index) => [index, title]), value => {
      here.passage = value;
      here.token = 0;
      render();
    });
    const slider = html("input", { type: "range", min: 0, step: 1 });
    const shown = html("output", {});
    const split = html("input", { type: "checkbox" });
    const panes = html("div", { class: "panes" });
    const words = html("p", { "aria-live": "polite" });
    const small = html("div", { class: "small" });
    holder.append(
      html("h3", {}, group.title),
      html("div", { class: "controls" }, runLabel, textLabel, html("label", {}, "Step", slider, shown),
        html("label", {}, split, `${PANES} steps side by side`)),
      keyOf(), panes, html("div", { class: "detail" }, html("div", {}, words, html("p", { class: "missing" },
        "Point at a token, or focus the text and press the arrow keys, to see its losses over training.")), small),
    );
    const losses = () => group.losses[here.losses];
    const closest = (steps, step) => steps.reduce((best, other, index) => Math.abs(other - step) < Math.abs(steps[best] - step) ? index : best, 0);
    runSelect.value = here.losses;
    here.step = losses().steps.length - 1;
    slider.addEventListener("input", () => { here.step = Number(slider.value); render(); });
    split.addEventListener("change", () => { here.isSplit = split.checked; render(); });

    function stepsShown() {
      const last = losses().steps.length - 1;
      if (!here.isSplit) return [here.step];
      return [...new Set(Array.from({ length: PANES }, (_, index) => Math.round(index * last / (PANES - 1))))];
    }

    function render() {
      const hadFocus = panes.contains(document.activeElement);
      const of = losses();
      slider.max = of.steps.length - 1;
      slider.value = here.step;
      slider.disabled = here.isSplit;
      slider.setAttribute("aria-valuetext", `step ${exact(of.steps[here.step])}`);
      shown.textContent = here.isSplit ? "" : exact(of.steps[here.step]);
      panes.replaceChildren(...stepsShown().map(step => pane(of, step)));
      explain(stepsShown()[0]);
      if (hadFocus) panes.querySelector("[tabindex='0']")?.focus();
    }

    function pane(of, step) {
      const kept = of.selected[here.passage][step];
      const count = kept ? [...kept].filter(bit => bit === "1").length : 0;
      const tail = kept ? `${count} of ${kept.length} tokens selected` : "no selection was recorded";
      const tokens = group.texts[here.passage][1].map((text, index) => {
        const excess = excessOf(of, step, index), shade = excess === null ? "none" : `x${data.shades.filter(edge => excess >= edge).length}`;
        const isKept = kept?.[index] === "1";
        const span = html("span", {
          class: `${shade}${isKept ? " kept" : ""}${index === here.token ? " here" : ""}`, role: "option",
          "aria-selected": isKept ? "true" : "false", tabindex: index === here.token ? 0 : -1,
        }, text === "" ? "▫" : text.replaceAll("\n", "⏎\n"));
        span.dataset.index = index;
        return span;
      });
      const list = html("div", { class: "tokens", role: "listbox", "aria-multiselectable": "true", "aria-orientation": "horizontal",
        "aria-label": `Text at step ${exact(of.steps[step])}; selected tokens are marked` }, ...tokens);
      const go = index => {
        here.token = Math.min(Math.max(index, 0), tokens.length - 1);
        for (const other of panes.querySelectorAll(".tokens span")) {
          const isHere = Number(other.dataset.index) === here.token;
          other.classList.toggle("here", isHere);
          other.tabIndex = isHere ? 0 : -1;
        }
        explain(step);
      };
      list.addEventListener("pointerover", event => { if (event.target.dataset.index) go(Number(event.target.dataset.index)); });
      list.addEventListener("focusin", event => { if (Number(event.target.dataset.index) !== here.token) go(Number(event.target.dataset.index)); });
      list.addEventListener("keydown", event => {
        const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 };
        const target = event.key === "Home" ? 0 : event.key === "End" ? tokens.length - 1 : here.token + (moves[event.key] ?? NaN);
        if (Number.isNaN(target)) return;
        event.preventDefault();
        go(target);
        tokens[here.token].focus();
      });
      return html("div", { class: "pane" }, html("h5", {}, `Step ${exact(of.steps[step])}: ${tail}`), list);
    }

    function excessOf(of, step, index) {
      const student = of.loss[here.passage][step][index], reference = of.reference?.[here.passage][index] ?? null;
      return student === null || reference === null ? null : (student - reference) / 100;
    }

    function explain(step) {
      const of = losses(), text = group.texts[here.passage][1][here.token];
      const student = of.loss[here.passage][step][here.token] / 100, excess = excessOf(of, step, here.token);
      const kept = of.selected[here.passage][step];
      const parts = [`Token ${here.token + 1}, ${text === "" ? "part of a character" : `“${text.replaceAll("\n", "⏎")}”`}, at step ${exact(of.steps[step])}: loss ${student.toFixed(2)}`];
      if (excess !== null) parts.push(`reference ${(student - excess).toFixed(2)}`, `excess ${excess.toFixed(2).replace("-", "−")}`);
      if (kept) parts.push(kept[here.token] === "1" ? "selected" : "not selected");
      words.textContent = `${parts.join(", ")}.`;
      small.replaceChildren();
      plotLines(small, tokenChart());
    }

    function tokenChart() {
      const curves = group.losses.map(of => ({
        label: data.runs[of.run].name, run: of.run, look: of.run, style: "line", x: of.steps,
        y: of.loss[here.passage].map(row => row[here.token] === null ? null : row[here.token] / 100),
      }));
      const of = losses();
      if (of.reference) {
        const value = of.reference[here.passage][here.token];
        curves.push({ label: "reference", run: null, look: data.runs.length + 1, style: "line",
          x: [of.steps[0], of.steps.at(-1)], y: [value, value].map(y => y === null ? null : y / 100) });
      }
      return { title: "Loss of this token", ylabel: "loss (nats)", xlabel: "step", categories: [], run: null, curves };
    }

    drawn.push(() => {
      group.losses.forEach((of, index) => { runSelect.options[index].hidden = !isShown(of.run); });
      if (!isShown(losses().run)) {
        const other = group.losses.findIndex(of => isShown(of.run));
        if (other >= 0) { here.losses = other; runSelect.value = other; here.step = losses().steps.length - 1; }
      }
      render();
    });
  }

  function keyOf() {
    const names = ["excess loss below 0", ...data.shades.map((edge, index) => {
      const next = data.shades[index + 1];
      return next === undefined ? `${edge} and more` : `${edge} to ${next}`;
    })];
    const shades = names.flatMap((name, index) => [html("span", { class: `x${index}` }, name), " "]);
    return html("p", { class: "tokens key" }, html("span", { class: "kept" }, "selected"), " · not selected · ", ...shades, "(nats)");
  }

  // ---- The toolbar

  function setUpToolbar() {
    const bar = document.getElementById("toolbar");
    if (data.runs.length > 1) bar.append(runMenu());
    const axis = html("select", { id: "axis" }, ...Object.entries(data.axes).map(([value, words]) => html("option", { value }, words)));
    axis.value = state.axis;
    axis.addEventListener("change", () => { state.axis = axis.value; apply(); });
    const late = html("input", { type: "checkbox", id: "late" });
    late.addEventListener("change", () => { state.late = late.checked; apply(); });
    const theme = html("button", { type: "button", id: "theme", class: "push" }, "Dark or light");
    theme.addEventListener("click", () => {
      const isDark = (document.documentElement.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
      document.documentElement.style.colorScheme = isDark ? "light" : "dark";
    });
    const print = html("button", { type: "button" }, "Print");
    print.addEventListener("click", () => window.print());
    bar.append(html("label", {}, "Horizontal axis ", axis), html("label", {}, late, " without the first tenth"), theme, print);
  }

  function runMenu() {
    const count = html("span");
    const boxes = data.runs.map((run, index) => {
      const box = html("input", { type: "checkbox" });
      box.checked = state.shown.has(index);
      box.addEventListener("change", () => { state.shown[box.checked ? "add" : "delete"](index); changed(); });
      return [box, html("label", {}, box, swatch({ look: index }), html("span", {}, run.name, " ", html("small", {}, run.note)))];
    });
    const every = (words, isOn) => {
      const button = html("button", { type: "button" }, words);
      button.addEventListener("click", () => {
        boxes.forEach(([box], index) => { box.checked = isOn; state.shown[isOn ? "add" : "delete"](index); });
        changed();
      });
      return button;
    };
    function changed() {
      count.textContent = `Runs: ${state.shown.size} of ${data.runs.length}`;
      apply();
    }
    count.textContent = `Runs: ${state.shown.size} of ${data.runs.length}`;
    const menu = html("details", { id: "runs" }, html("summary", { class: "button" }, count),
      html("div", { class: "menu", role: "group", "aria-label": "Runs that are shown" },
        every("All", true), " ", every("None", false), ...boxes.map(([, label]) => label)));
    menu.addEventListener("keydown", event => {
      if (event.key === "Escape") { menu.open = false; menu.querySelector("summary").focus(); }
    });
    document.addEventListener("pointerdown", event => { if (!menu.contains(event.target)) menu.open = false; });
    return menu;
  }

  // ---- Start

  setUpToolbar();
  const figures = [...document.querySelectorAll("figure")].map(setUpFigure);
  const near = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) figures.find(({ figure }) => figure === entry.target).come();
  }, { rootMargin: "800px" });
  for (const { figure } of figures) near.observe(figure);
  document.querySelectorAll(".passages").forEach((holder, index) => setUpPassages(holder, data.passages[index]));
  apply();
  const drawAll = () => figures.forEach(({ come }) => come());
  const folds = [...document.querySelectorAll("details.fold")];
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = folds.filter(fold => !fold.open);
    for (const fold of opened) fold.open = true;
  });
  window.addEventListener("afterprint", () => { for (const fold of opened) fold.open = false; });
  window.addEventListener("beforeprint", drawAll);
  // The page is whole a moment after it opens, for printing by programs and for searching.
  let index = 0;
  function drawNext(deadline) {
    while (index < figures.length && deadline.timeRemaining() > 2) figures[index++].come();
    if (index < figures.length) requestIdleCallback(drawNext); else document.documentElement.dataset.ready = "yes";
  }
  if (window.requestIdleCallback) requestIdleCallback(drawNext); else setTimeout(() => { drawAll(); document.documentElement.dataset.ready = "yes"; }, 50);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; for (const draw of drawn) draw(); }
  });
})();
