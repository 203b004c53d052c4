// A report: a link into a folded part opens it, printing opens every part, and one button opens or folds the notebook.
// Without this script the parts are opened manually.
(() => {
  const parts = (selector) => [...document.querySelectorAll(selector)];
  const PRINTED = "details.part, details.more";
  let opened = [];

  function fragment() {
    try {
      return decodeURIComponent(location.hash.slice(1));
    } catch {
      return ""; // an address that was cut off in the middle of a character names nothing
    }
  }

  function unfold() {
    const target = document.getElementById(fragment());
    if (!target) return;
    for (let part = target.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
    target.scrollIntoView();
  }

  addEventListener("hashchange", unfold);
  document.addEventListener("click", (event) => {
    if (event.target.closest('a[href^="#"]')) setTimeout(unfold); // also where the address stays the same
  });
  addEventListener("beforeprint", () => {
    opened = parts(PRINTED).filter((part) => !part.open);
    for (const part of opened) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of opened) part.open = false;
    opened = [];
  });

  const all = document.querySelector(".unfold button");
  const anyFolded = () => parts("details.part").some((part) => !part.open);
  const name = () => (all.textContent = anyFolded() ? "Open all sections" : "Fold all sections");
  if (all && parts("details.part").length) {
    all.parentElement.hidden = false;
    all.addEventListener("click", () => {
      const open = anyFolded();
      for (const part of parts("details.part")) part.open = open;
    });
    document.addEventListener("toggle", name, true);
    name();
  }
  unfold();
})();
