"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const painted = (value) => {
    if (typeof value === "string") return /^--[a-z]+$/.test(value) ? colour(value) : value;
    if (Array.isArray(value)) return value.map(painted);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, painted(part)]));
    }
    return value;
  };
  const styled = (layout) => {
    const font = { family: colour("--font"), size: 13, color: colour("--text") };
    const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), fixedrange: true };
    const titled = (given = {}) => ({ ...painted(given), title: { font: { size: 13 }, ...given.title } });
    return {
      ...painted(layout),
      font,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font, align: "left" },
      xaxis: { ...axis, ...titled(layout.xaxis) },
      yaxis: { ...axis, ...titled(layout.yaxis) },
    };
  };
  const shown = {};
  const draw = (id) => {
    const { data, layout } = figures[id];
    const chosen = data.map((trace) => (shown[id] === undefined ? trace : { ...trace, visible: trace.meta === shown[id] }));
    return Plotly.react(id, painted(chosen), styled(layout), { responsive: true, displayModeBar: false });
  };
  const all = () => Promise.all(Object.keys(figures).map(draw));
  for (const select of document.querySelectorAll("select[data-figure]")) {
    const id = select.dataset.figure;
    const names = [...new Set(figures[id].data.map((trace) => trace.meta))];
    select.addEventListener("change", () => {
      shown[id] = names[Number(select.value)];
      draw(id);
    });
  }
  dark.addEventListener("change", all);
  all().then(() => document.documentElement.setAttribute("data-drawn", "yes"));
})();
