"use strict";
const views = [];
const specs = JSON.parse(document.getElementById("specs").textContent);
const bar = document.getElementById("chosen");
let chosen = "";

// A choice is a trial's name: rows show it, charts fade the others.
function choose(name) {
  chosen = name;
  for (const view of views) view.signal("chosen", name).runAsync();
  for (const button of document.querySelectorAll(".choose")) {
    button.setAttribute("aria-pressed", String(name !== "" && button.closest("tr").dataset.mark === name));
  }
  bar.hidden = name === "";
  bar.querySelector("b").textContent = name;
}

function sort(header) {
  const index = [...header.parentNode.children].indexOf(header);
  const body = header.closest("table").tBodies[0];
  const down = header.getAttribute("aria-sort") === "ascending";
  const key = row => row.cells[index].dataset.value ?? row.cells[index].textContent;
  const missing = value => value === "";
  const rows = [...body.rows].sort((one, other) => {
    const [a, b] = [key(one), key(other)];
    if (missing(a) || missing(b)) return missing(a) - missing(b); // what was not measured stays last
    const order = a - b || String(a).localeCompare(String(b), undefined, { numeric: true });
    return down ? -order : order;
  });
  for (const each of header.parentNode.children) each.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows);
}

async function copy(button) {
  const text = button.parentNode.querySelector("code").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page from a file may not use the clipboard's own interface
    getSelection().selectAllChildren(button.parentNode.querySelector("code"));
    document.execCommand("copy");
  }
  button.textContent = "Copied";
}

document.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (button?.matches(".choose")) choose(button.closest("tr").dataset.mark === chosen ? "" : button.closest("tr").dataset.mark);
  else if (button?.matches(".sort")) sort(button.closest("th"));
  else if (button?.matches(".copy")) copy(button);
  else if (button?.closest("#chosen")) choose("");
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && chosen) choose("");
});

// A page of paper has another width than the window.
addEventListener("beforeprint", () => {
  for (const view of views) view.width(view.container().closest(".small") ? 310 : 660).run();
});
addEventListener("afterprint", () => dispatchEvent(new Event("resize")));

async function draw(id) {
  const options = { renderer: "svg", actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: id };
  const { view } = await vegaEmbed(`#chart-${id}`, specs[id], options);
  views.push(view);
  view.addEventListener("click", (_, item) => choose(item?.datum?.trial && item.datum.trial !== chosen ? item.datum.trial : ""));
}

// One chart after the other, the first ones first, so that the page answers while the last are drawn.
(async () => {
  for (const id of Object.keys(specs)) {
    await draw(id);
    await new Promise(resolve => setTimeout(resolve));
  }
  document.documentElement.dataset.drawn = views.length;
})();
