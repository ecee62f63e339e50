"use strict";
(() => {
  const root = document.documentElement;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const make = (tag, cls, text) => {
    const node = document.createElement(tag);
    if (cls) node.className = cls;
    if (text !== undefined && text !== null) node.textContent = text;
    return node;
  };

  // Theme: the address (#dark, #light), then the last choice, then the system's.
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = { "#dark": "dark", "#light": "light" }[location.hash] || null;
  try { chosen = chosen || localStorage.getItem("longspan-theme"); } catch (error) { /* files may have no storage */ }
  const button = document.getElementById("theme");
  const paint = () => {
    root.dataset.theme = chosen || (system.matches ? "dark" : "light");
    button.textContent = root.dataset.theme === "dark" ? "Light" : "Dark";
  };
  button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("longspan-theme", chosen); } catch (error) { /* as above */ }
    paint();
  });
  system.addEventListener("change", paint);
  paint();

  // Charts: panels are laid out for the width there is.
  const charts = read("charts");
  const options = { renderer: "svg", actions: false, tooltip: { theme: "custom", offsetX: 14, offsetY: 12 } };
  const fitted = (chart, width) => {
    const spec = structuredClone(chart.spec);
    if (!spec.facet) { spec.width = Math.max(120, Math.floor(width) - 2); return spec; }
    const axis = 64, gap = spec.spacing.column;
    const room = (n) => Math.floor((width - axis - chart.label - gap * (n - 1)) / n);
    const fits = [];
    for (let n = spec.columns; n > 1; n -= 1) if (room(n) >= chart.least) fits.push(n);
    const columns = fits.find((n) => chart.panels % n === 0) || fits[0] || 1;
    spec.columns = columns;
    spec.spec.width = Math.max(110, room(columns));
    return spec;
  };
  const draw = (host) => {
    const width = host.clientWidth;
    if (!width || host.dataset.width === String(width)) return Promise.resolve();
    host.dataset.width = String(width);
    return vegaEmbed(host, fitted(charts[host.dataset.chart], width), options).catch((error) => {
      host.textContent = `This chart could not be drawn (${error.message}); its table is below.`;
    });
  };
  const hosts = [...document.querySelectorAll(".chart")];
  const drawAll = () => Promise.all(hosts.map(draw));
  let waiting = 0;
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 150); });
  drawAll().then(() => { root.dataset.ready = "yes"; });

  // Where the reader is.
  const links = new Map([...document.querySelectorAll(".toc a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((a) => a.classList.remove("here"));
      links.get(entry.target.id)?.classList.add("here");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  document.querySelectorAll("main section").forEach((section) => seen.observe(section));

  for (const copy of document.querySelectorAll("button[data-copy]")) {
    copy.addEventListener("click", () => navigator.clipboard.writeText(copy.previousElementSibling.textContent)
      .then(() => { copy.textContent = "Copied"; setTimeout(() => { copy.textContent = "Copy"; }, 1500); }));
  }

  // Look inside. Model text only ever enters through textContent.
  const list = document.getElementById("items");
  if (!list) return;
  const { rows, colours } = read("item-data");
  const field = (id) => document.getElementById(id);
  const number = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : value.toPrecision(4));
  const wrong = (row, answer) => row.correct && answer.score !== null && answer.score < 1;
  const outcome = {
    all: () => true,
    differ: (row) => new Set(row.answers.map((a) => a.score)).size > 1,
    wrong: (row) => row.answers.some((a) => wrong(row, a)),
    "all-wrong": (row) => row.answers.length > 0 && row.answers.every((a) => wrong(row, a)),
    null: (row) => row.answers.some((a) => a.null),
  };
  const haystack = rows.map((row) => [row.probe, row.item, row.asked, row.expected,
    ...row.answers.flatMap((a) => [a.subject, a.text, a.null])].join("\n").toLowerCase());
  const scored = (row, a) => {
    if (a.null) return a.null;
    if (a.score === null) return "not scored";
    if (row.correct && a.score === 1) return "✓";
    if (row.correct && a.score === 0) return "✗";
    return number(a.score);
  };
  const label = (row, a) => (row.answers.some((b) => b.subject === a.subject && b.seed !== a.seed) ? `${a.subject} #${a.seed}` : a.subject);
  const tint = (node, subject) => { if (colours[subject]) node.style.setProperty("--c", `var(${colours[subject]})`); return node; };
  const entry = (row) => {
    const box = make("details", "item"), head = make("summary");
    head.append(make("span", "asked", row.asked || row.item));
    const chips = make("span", "chips");
    for (const a of row.answers.slice(0, 12)) {
      const kind = a.null ? "null" : row.correct && a.score === 1 ? "right" : row.correct ? "wrong" : "";
      chips.append(tint(make("span", `chip ${kind}`, `${label(row, a)} ${scored(row, a)}`), a.subject));
    }
    if (row.answers.length > 12) chips.append(make("span", "chip", `+ ${row.answers.length - 12}`));
    head.append(chips);
    head.append(make("span", "meta", [row.probe, row.item, row.x === null ? "" : `at ${number(row.x)}`].filter(Boolean).join(" · ")));
    box.append(head);
    box.addEventListener("toggle", () => {
      if (!box.open || box.dataset.full) return;
      box.dataset.full = "yes";
      if (row.expected) {
        const right = make("div", "answer");
        right.append(make("b", "", "expected"), make("span", "model", row.expected));
        box.append(right);
      }
      for (const a of row.answers) {
        const line = tint(make("div", "answer"), a.subject);
        line.append(make("b", "", label(row, a)), make("span", "model", a.text || "–"),
          make("span", "soft", `${scored(row, a)}${a.scored ? ` (${a.scored})` : ""}`));
        box.append(line);
      }
    });
    return box;
  };
  let shown = 20;
  const show = () => {
    const words = field("item-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const probe = field("item-probe").value, x = field("item-x").value;
    const keep = rows.filter((row, i) => (!probe || row.probe === probe) && (!x || String(row.x) === x)
      && outcome[field("item-outcome").value](row) && words.every((word) => haystack[i].includes(word)));
    list.replaceChildren(...keep.slice(0, shown).map(entry));
    field("item-count").textContent = `${keep.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} items`;
    field("item-more").hidden = keep.length <= shown;
  };
  for (const id of ["item-search", "item-probe", "item-x", "item-outcome"]) {
    field(id).addEventListener("input", () => { shown = 20; show(); });
  }
  field("item-more").addEventListener("click", () => { shown += 40; show(); });
  show();
})();
