// Shows the rows of the chosen model, goal and margin; the choice stands in the address, so that it can be sent.
"use strict";
const choice = document.getElementById("choice");
const rows = [...document.querySelectorAll("#advice tbody tr")];
const names = ["model", "goal", "keep"];

function show() {
  const chosen = Object.fromEntries(names.map((name) => [name, choice.elements[name].value]));
  for (const row of rows) {
    row.hidden = names.some((name) => row.dataset[name] !== chosen[name]);
  }
  history.replaceState(null, "", "#" + new URLSearchParams(chosen));
}

for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
  const field = choice.elements[name];
  if (field && [...field.options].some((option) => option.value === value)) {
    field.value = value;
  }
}
choice.addEventListener("change", show);
show();
