// What an accessibility checker looks for, in the page as it is shown: returns a list of faults, a line each.
() => {
  const faults = [];
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const seen = (element) => element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length > 0;
  const told = (element) => `${element.tagName.toLowerCase()}${element.id ? "#" + element.id : ""}.${element.getAttribute("class") || ""} "${(element.textContent || "").trim().slice(0, 40)}"`;
  const name = (element) => {
    const by = (element.getAttribute("aria-labelledby") || "").split(" ").map((id) => document.getElementById(id)?.textContent || "").join(" ");
    const label = element.labels ? [...element.labels].map((one) => one.textContent).join(" ") : "";
    const inner = [element.textContent, ...all("img[alt]", element).map((image) => image.alt)].join(" ");
    return (by || element.getAttribute("aria-label") || element.getAttribute("alt") || label || inner || element.title || "").trim();
  };
  const want = (sound, text) => { if (!sound) faults.push(text); };

  want(document.documentElement.lang, "html without lang");
  want(document.title.trim(), "no title");
  want(all("main").length === 1, "not exactly one main");
  want(all("h1").filter(seen).length === 1, "not exactly one h1");
  let level = 0;
  for (const heading of all("h1,h2,h3,h4,h5,h6").filter(seen)) {
    const next = Number(heading.tagName[1]);
    want(next <= level + 1, `heading skips from ${level}: ${told(heading)}`);
    level = next;
  }
  for (const element of all("img, svg[role=img]")) want(name(element), `no alternative text: ${told(element)}`);
  for (const element of all("svg:not([role])")) want(element.getAttribute("aria-hidden") === "true", `svg neither named nor hidden: ${told(element)}`);
  for (const element of all("a[href], button, select, input, summary, [role=region], nav")) want(name(element), `no name: ${told(element)}`);
  const links = new Map();
  for (const link of all("a[href]").filter(seen)) {
    const other = links.get(name(link));
    want(!other || other === link.href, `two links "${name(link)}" lead to different places`);
    links.set(name(link), link.href);
  }
  const ids = all("[id]").map((element) => element.id);
  for (const id of new Set(ids)) want(ids.filter((other) => other === id).length === 1, `id twice: ${id}`);
  for (const element of all("[aria-labelledby], [aria-controls], [aria-describedby]"))
    for (const attribute of ["aria-labelledby", "aria-controls", "aria-describedby"])
      for (const id of (element.getAttribute(attribute) || "").split(" ").filter(Boolean)) want(document.getElementById(id), `${attribute} leads nowhere: ${id}`);
  const roles = ["table", "rowgroup", "row", "cell", "columnheader", "rowheader", "img", "region", "status", "tablist", "tab", "tabpanel"];
  for (const element of all("[role]")) want(roles.includes(element.getAttribute("role")), `unknown role: ${told(element)}`);
  for (const table of all("table")) {
    want(all("th", table).length > 0, `table without headers: ${told(table)}`);
    for (const header of all("th", table)) want(header.scope, `header without scope: ${told(header)}`);
  }
  for (const list of all("ul, ol")) for (const child of list.children) want(child.tagName === "LI", `in a list: ${told(child)}`);
  for (const list of all("dl")) for (const child of list.children) want(["DT", "DD", "DIV"].includes(child.tagName), `in a dl: ${told(child)}`);
  for (const element of all("body *").filter(seen)) {
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(element).overflowX) && element.scrollWidth > element.clientWidth + 1;
    want(!scrolls || element.tabIndex >= 0, `scrolls but not by keyboard: ${told(element)}`);
  }

  // A target within a line of text may be as high as the line (WCAG 2.5.8); what stands alone is large enough for a finger.
  for (const element of all("a[href], button, select, input, summary").filter(seen)) {
    const alone = !element.closest(".notebook, .prose, p.note") && !element.closest(".skip");
    const { width, height } = element.getBoundingClientRect();
    want(!alone || (width >= 23.9 && height >= 23.9), `target of ${width.toFixed(0)} × ${height.toFixed(0)}: ${told(element)}`);
  }

  const parse = (text) => { const parts = (text.match(/[\d.]+/g) || []).map(Number); return text.startsWith("rgb") ? [...parts.slice(0, 3), parts[3] ?? 1] : null; };
  const blend = (over, under) => [0, 1, 2].map((i) => over[i] * over[3] + under[i] * (1 - over[3]));
  const light = (colour) => { const [r, g, b] = colour.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) { const colour = parse(getComputedStyle(at).backgroundColor); if (colour && colour[3] > 0) layers.push(colour); if (colour && colour[3] === 1) break; }
    return layers.reverse().reduce((under, over) => blend(over, under), [255, 255, 255]);
  };
  const reported = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || !seen(element) || element.closest("script, style, option, .words, .skip")) continue;
    const style = getComputedStyle(element);
    const inside = element.closest("svg");
    const ink = parse(inside ? style.fill : style.color);
    if (!ink) continue;
    const under = ground(inside ? inside : element);
    const [a, b] = [light(blend(ink, under)), light(under)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const least = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
    const ratio = (a + 0.05) / (b + 0.05);
    const key = `${element.tagName}.${element.getAttribute("class")}`;
    if (ratio < least && !reported.has(key)) { reported.add(key); faults.push(`contrast ${ratio.toFixed(2)}: ${told(element)}`); }
  }
  return faults;
}
