// Filters the matrix, the views by dimension and the charts by model, dimension and verdict. Without it, all is shown.
(() => {
  const form = document.getElementById("filter");
  if (!form) return;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const matches = (cell, dimension, verdict) => {
    if (!verdict) return true;
    if (cell.dataset.status === verdict) return true;
    if (cell.dataset.verdicts !== undefined) return cell.dataset.verdicts.split(" ").includes(verdict);
    return all(".part", cell).some((part) => part.dataset.verdict === verdict && (!dimension || part.dataset.dimension === dimension));
  };
  const apply = () => {
    const { model, dimension, verdict } = Object.fromEntries(new FormData(form));
    for (const element of all("[data-model]")) element.hidden = Boolean(model) && element.dataset.model !== model;
    for (const element of all("[data-dimension]")) element.hidden = Boolean(dimension) && element.dataset.dimension !== dimension;
    for (const table of all("table.matrix")) {
      for (const row of all("tbody tr", table)) {
        let any = false;
        for (const cell of all("td", row)) {
          const shown = matches(cell, dimension, verdict);
          cell.firstElementChild.hidden = !shown;
          any = any || (shown && !cell.hidden);
        }
        row.hidden = !any;
      }
    }
    const cells = all("#matrix ~ table.matrix td[id]");
    const shown = cells.filter((cell) => !cell.hidden && !cell.firstElementChild.hidden);
    form.elements.shown.value = `${shown.length} of ${cells.length} cells shown`;
  };
  form.hidden = false;
  form.addEventListener("change", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  apply();
})();
