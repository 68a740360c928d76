"use strict";
// Search, order and paging of the samples. Without scripts every sample is simply there.
(() => {
  const form = document.getElementById("find");
  if (!form) return;
  const query = document.getElementById("query");
  const order = document.getElementById("order");
  const marks = document.getElementById("marks");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const section = document.getElementById("samples");
  const lists = [...document.querySelectorAll(".samples")];
  const all = [...document.querySelectorAll(".sample")];
  const texts = new Map(all.map((s) => [s, s.textContent.toLowerCase()]));
  const page = 20;
  let shown = page;

  const keys = {
    place: (s) => Number(s.dataset.place),
    best: (s) => -Number(s.dataset.gain),
    worst: (s) => Number(s.dataset.gain),
  };

  function draw() {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (s) => words.every((w) => texts.get(s).includes(w));
    let found = 0;
    for (const list of lists) {
      const own = [...list.children].sort((a, b) => keys[order.value](a) - keys[order.value](b));
      let place = 0;
      for (const sample of own) {
        list.append(sample);
        const fit = fits(sample);
        found += fit;
        sample.hidden = !fit || place >= shown;
        place += fit;
      }
    }
    const visible = all.filter((s) => !s.hidden).length;
    count.textContent = `${visible} of ${found} prompts shown`;
    more.hidden = visible >= found;
  }

  query.addEventListener("input", () => { shown = page; draw(); });
  order.addEventListener("change", () => { shown = page; draw(); });
  marks.addEventListener("change", () => section.classList.toggle("unmarked", !marks.checked));
  more.addEventListener("click", () => {
    const before = all.filter((s) => !s.hidden).length;
    shown += page;
    draw();
    const next = all.filter((s) => !s.hidden)[before];
    if (next) { next.tabIndex = -1; next.focus(); }
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  draw();
})();
