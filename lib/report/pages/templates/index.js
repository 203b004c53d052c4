// The index: tabs, the choice of model, goal and margin, sorting, and the filter of the matrix. The address holds the
// state, so that a link can share it. Without this script everything is shown.
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const table = document.getElementById("decisions");
  const choice = document.getElementById("choice");
  const filter = document.getElementById("filter");
  const tabs = all("nav.tabs a");
  const panelOf = (tab) => document.getElementById(tab.hash.slice(1));
  const CHOSEN = ["model", "goal", "keep", "limit"];
  const SIFTED = { column: "model", dimension: "dimension", verdict: "verdict" }; // in the address: in the filter's form
  const LIMITED = ["memory", "size"]; // goals that may have a limit
  const asMade = table ? all("tbody tr", table) : [];
  const order = { key: "", down: false };
  let open = tabs[0];
  document.documentElement.classList.add("js");

  function show(tab) {
    open = tab;
    for (const other of tabs) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", String(chosen));
      other.tabIndex = chosen ? 0 : -1;
      panelOf(other).hidden = !chosen;
    }
  }

  function remember() {
    const state = new URLSearchParams();
    for (const name of choice ? CHOSEN : []) {
      if (name !== "limit" || choice.elements.limit.value) state.set(name, choice.elements[name].value);
    }
    if (order.key) state.set("sort", (order.down ? "-" : "") + order.key);
    for (const [name, field] of filter ? Object.entries(SIFTED) : []) {
      if (filter.elements[field].value) state.set(name, filter.elements[field].value);
    }
    state.set("view", open.hash.slice(1));
    history.replaceState(null, "", "#" + state);
  }

  // Return the decision that applies if an optimization exceeds the reader's limit (in MB), or if that cannot be
  // checked; null where the limit changes nothing.
  function beyond(item, limit) {
    const limited = item.querySelector(".limited");
    if (!limited) return null;
    const passed = limit > 0 && !(limited.dataset.bytes && Number(limited.dataset.bytes) <= limit * 1e6);
    limited.hidden = !passed;
    item.querySelector(".said").hidden = passed;
    return passed ? limited.dataset.decision : null;
  }

  function decide() {
    const { model, goal, keep, limit } = Object.fromEntries(new FormData(choice));
    const counts = {};
    document.getElementById("limit").hidden = !LIMITED.includes(goal);
    for (const row of all("tbody tr", table)) {
      row.hidden = Boolean(model) && row.dataset.model !== model;
      for (const item of all("li", row)) {
        item.hidden = item.dataset.goal !== goal || !item.dataset.keeps.split(" ").includes(keep);
        const word = beyond(item, LIMITED.includes(goal) ? Number(limit) : 0) ?? item.dataset.decision;
        if (!item.hidden && !row.hidden) counts[word] = (counts[word] || 0) + 1;
      }
    }
    table.classList.toggle("one-model", Boolean(model));
    choice.elements.counted.value = Object.entries(counts).map(([word, number]) => `${number} ${word}`).join(", ");
    sort();
  }

  function valueOf(row, key) {
    if (key === "optimization") return row.querySelector("th a").textContent;
    if (key === "decision") {
      const item = all("li", row).find((other) => !other.hidden);
      const decided = item?.querySelector(".limited:not([hidden])") ?? item;
      return Number(decided?.dataset.order ?? 99);
    }
    const text = all("td", row).find((cell) => cell.dataset.label.toLowerCase() === key).dataset.value;
    return text === "" ? null : Number(text);
  }

  function sort() {
    const key = order.key || "decision";
    const turn = order.down ? -1 : 1;
    const rows = asMade.map((row) => [valueOf(row, key), row]); // ties keep the original order
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return Number(a === null) - Number(b === null); // missing values last
      return turn * (a < b ? -1 : a > b ? 1 : 0);
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
    for (const head of all("thead th", table)) {
      const word = order.down ? "descending" : "ascending";
      head.setAttribute("aria-sort", head.dataset.key === key ? word : "none");
    }
  }

  function sortBy(key) {
    const bestFirst = key !== "optimization" && key !== "decision"; // a larger change is a better one
    order.down = (order.key || "decision") === key ? !order.down : bestFirst;
    order.key = key;
    sort();
    remember();
  }

  const matches = (cell, dimension, verdict) => {
    if (!verdict || cell.dataset.status === verdict) return true;
    const parts = all(".part", cell).filter((part) => !dimension || part.dataset.dimension === dimension);
    return parts.some((part) => part.dataset.verdict === verdict);
  };

  function sift() {
    const { model, dimension, verdict } = Object.fromEntries(new FormData(filter));
    for (const element of all("#matrix [data-model], #trade-offs [data-model]")) {
      element.hidden = Boolean(model) && element.dataset.model !== model;
    }
    for (const part of all("#matrix .part")) part.hidden = Boolean(dimension) && part.dataset.dimension !== dimension;
    for (const row of all("#matrix tbody tr")) {
      let any = false;
      for (const cell of all("td", row)) {
        const shown = matches(cell, dimension, verdict);
        cell.firstElementChild.hidden = !shown;
        any = any || (shown && !cell.hidden);
      }
      row.hidden = !any;
    }
    const cells = all("#matrix td[id]");
    const shown = cells.filter((cell) => !cell.hidden && !cell.firstElementChild.hidden);
    filter.elements.shown.value = `${shown.length} of ${cells.length} cells shown`;
  }

  function unsift() {
    for (const field of Object.values(SIFTED)) filter.elements[field].value = "";
    sift();
  }

  function fragment() {
    try {
      return decodeURIComponent(location.hash.slice(1));
    } catch {
      return location.hash.slice(1); // an address that was cut off in the middle of a character
    }
  }

  function read() {
    const hash = fragment();
    if (hash && !hash.includes("=")) {
      const target = document.getElementById(hash);
      const tab = target && tabs.find((other) => panelOf(other).contains(target));
      if (tab) {
        show(tab);
        // Show the target of a link even if the filter hides it.
        if (filter && (target.closest("[hidden]") || target.querySelector(".inside[hidden]"))) unsift();
        target.scrollIntoView();
      }
      return;
    }
    const state = new URLSearchParams(location.hash.slice(1));
    const take = (name, field) => {
      const known = !field.options || [...field.options].some((option) => option.value === state.get(name));
      if (state.has(name) && known) field.value = state.get(name);
    };
    for (const [name, field] of filter ? Object.entries(SIFTED) : []) {
      filter.elements[field].value = ""; // a field that the address omits is reset
      take(name, filter.elements[field]);
    }
    if (filter) sift();
    if (choice) {
      choice.reset();
      order.key = "";
      order.down = false;
      for (const name of CHOSEN) take(name, choice.elements[name]);
      const [, minus, key] = /^(-?)(.*)$/.exec(state.get("sort") || "");
      if (all("thead th", table).some((head) => head.dataset.key === key)) {
        order.key = key;
        order.down = minus === "-";
      }
    }
    show(tabs.find((tab) => tab.hash === "#" + state.get("view")) || open);
  }

  document.querySelector("nav.tabs").setAttribute("role", "tablist");
  tabs.forEach((tab, at) => {
    const panel = panelOf(tab);
    tab.id = `tab-${panel.id}`;
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", (event) => {
      event.preventDefault();
      show(tab);
      remember();
    });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = tabs[(at + step + tabs.length) % tabs.length];
      show(next);
      next.focus();
      remember();
    });
  });
  if (choice) {
    for (const head of all("thead th", table)) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      button.addEventListener("click", () => sortBy(head.dataset.key));
      head.replaceChildren(button);
    }
    choice.hidden = false;
    choice.addEventListener("submit", (event) => event.preventDefault());
    for (const event of ["change", "input"]) {
      choice.addEventListener(event, () => {
        decide();
        remember();
      });
    }
  }
  if (filter) {
    filter.hidden = false;
    const sifted = () => {
      sift();
      remember();
    };
    filter.addEventListener("change", sifted);
    filter.addEventListener("submit", (event) => event.preventDefault());
    filter.addEventListener("reset", () => setTimeout(sifted));
    sift();
  }
  show(open);
  read();
  if (choice) decide();
  window.addEventListener("hashchange", () => {
    read();
    if (choice) decide();
  });
})();
