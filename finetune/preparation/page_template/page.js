"use strict";
const byId = (id) => document.getElementById(id);
const search = byId("search"), show = byId("show"), sort = byId("sort");
const groups = [...document.querySelectorAll(".group")].map((section) => ({
  section,
  heading: section.querySelector("small"),
  cards: [...section.querySelectorAll(".card")].map((card) => ({
    card,
    flags: card.dataset.f.split(" "),
    values: card.dataset.v.split(",").map(Number),
    name: card.querySelector("h4").textContent,
    text: null,
  })),
}));
const all = groups.reduce((sum, group) => sum + group.cards.length, 0);
const counted = (count) => count.toLocaleString("en") + (count === 1 ? " clip" : " clips");

function isShown(each, words, flag) {
  if (flag && !each.flags.includes(flag)) return false;
  if (!words.length) return true;
  if (each.text === null) {
    const captions = [...each.card.querySelectorAll(".caption")].map((caption) => caption.textContent);
    each.text = [each.name, ...captions].join(" ").toLowerCase();
  }
  return words.every((word) => each.text.includes(word));
}

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let total = 0;
  for (const group of groups) {
    let count = 0;
    for (const each of group.cards) {
      const shown = isShown(each, words, show.value);
      each.card.hidden = !shown;
      count += shown;
    }
    group.section.hidden = !count;
    group.heading.textContent = counted(count);
    total += count;
  }
  byId("count").textContent = total === all ? counted(all) : `${total.toLocaleString("en")} of ${counted(all)}`;
  byId("nothing").hidden = total > 0;
}

const names = new Intl.Collator("en", { numeric: true }); // a hundred times as fast as localeCompare

function order() {
  const by = sort.value;
  const place = (a, b) => a.values[0] - b.values[0];
  const compare = by === "0" ? place
    : by === "name" ? (a, b) => names.compare(a.name, b.name) || place(a, b)
    : (a, b) => b.values[by] - a.values[by] || place(a, b);
  for (const group of groups) {
    group.cards.sort(compare).forEach((each, place) => {
      each.card.style.order = place; // moving thousands of nodes takes seconds
    });
  }
}

let waiting = 0;
search.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(filter, 120);
});
show.addEventListener("change", filter);
sort.addEventListener("change", order);
byId("tools").addEventListener("submit", (event) => event.preventDefault());
for (const tile of document.querySelectorAll("[data-show]")) {
  tile.addEventListener("click", () => {
    show.value = tile.dataset.show;
    filter();
  });
}
search.value = "";
show.value = "";
sort.value = "0";
byId("tools").hidden = false;
filter();
