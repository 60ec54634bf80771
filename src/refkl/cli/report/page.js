"use strict";
(() => {
  const root = document.documentElement;
  const { documents, items, colours } = JSON.parse(document.getElementById("data").textContent);
  const models = (type) =>
    Bokeh.documents.flatMap((one) => [...one.all_models]).filter((model) => model.type === type);

  // The plots are on canvases, which no style sheet reaches.
  function recolour() {
    const style = getComputedStyle(root);
    const of = (name) => style.getPropertyValue(name).trim();
    for (const axis of models("LinearAxis")) {
      axis.setv({ axis_label_text_color: of("--ink"), major_label_text_color: of("--muted") });
    }
    for (const grid of models("Grid")) grid.setv({ grid_line_color: of("--line") });
    for (const { glyph } of models("GlyphRenderer")) {
      const colour = of(`--run-${glyph.tags[0] % colours}`);
      for (const name of ["line_color", "fill_color"]) {
        const now = glyph.attributes[name];
        if (now && now.value !== null) glyph.setv({ [name]: { value: colour } });
      }
    }
  }

  function show(run, shown) {
    for (const renderer of models("GlyphRenderer")) {
      if (renderer.glyph.tags.includes(run)) renderer.visible = shown;
    }
    for (const element of document.querySelectorAll(`[data-of="${run}"]`)) element.hidden = !shown;
  }

  for (const button of document.querySelectorAll("button[data-run]")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      show(Number(button.dataset.run), shown);
    });
  }
  for (const choice of document.querySelectorAll("input[name=colour]")) {
    choice.addEventListener("change", () => { document.body.dataset.colour = choice.value; });
    if (choice.checked) document.body.dataset.colour = choice.value;
  }

  const tip = document.getElementById("tip");
  function point(event) {
    const piece = event.target.closest("[data-n]");
    tip.hidden = !piece;
    if (!piece) return;
    tip.textContent = piece.dataset.n;
    const box = [...piece.getClientRects()].find((one) => event.clientY <= one.bottom) || piece.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
    tip.style.top = `${box.top > tip.offsetHeight + 8 ? box.top - tip.offsetHeight - 5 : box.bottom + 5}px`;
  }
  document.addEventListener("pointerover", point);
  document.addEventListener("click", point);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  if (items.length) {
    Bokeh.embed.embed_items(documents, items).then(() => {
      recolour();
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
      const drawn = () => { root.dataset.plots = String(items[0].root_ids.length); };
      for (const one of Bokeh.documents) one.is_idle ? drawn() : one.idle.connect(drawn);
    });
  }
})();
