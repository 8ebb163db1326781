"use strict";
const at = (id) => document.getElementById(id);
const wished = { good: "Defect missed", anomalous: "Good after all", unsure: "Good after all" };
const drawn = new Map();

function make(name, attributes, text) {
  const svg = ["circle", "line", "rect"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

async function mark(number, what, button) {
  const who = at("who").value.trim();
  if (!who) { at("said").textContent = "Enter your name first."; at("who").focus(); return; }
  const answer = await fetch("api/mark", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ number, what, who }),
  });
  const found = await answer.json();
  at("said").textContent = answer.ok ? `Copied to ${found.copy}.` : found.error;
  if (answer.ok) button.disabled = true;
}

function card(image) {
  const item = make("li", { class: image.decision });
  const score = image.score.toFixed(3) + (image.p_value === null ? "" : `, p ${image.p_value.toFixed(3)}`);
  item.append(make("img", { src: `image/${image.number}`, alt: `${image.image} under its anomaly map`, loading: "lazy" }));
  item.append(make("p", {}, `${image.decision}: ${image.image}, score ${score}`));
  const button = make("button", { type: "button" }, wished[image.decision]);
  button.addEventListener("click", () => mark(image.number, image.decision === "good" ? "defect" : "good", button));
  item.append(button);
  return item;
}

function show(state) {
  at("counts").textContent = `${state.scored} images scored, ${state.dropped} frames dropped, ${state.lost} files lost`;
  at("troubles").textContent = state.troubles.join(" ");
  at("troubles").hidden = !state.troubles.length;
  at("verdict").textContent = state.verdict;
  at("verdict").className = state.verdict.startsWith("CHANGED") ? "changed" : "";
  const now = new Set(state.images.map((image) => image.number));
  for (const [number, item] of drawn) if (!now.has(number)) {
    if (item.contains(document.activeElement)) continue; // what somebody is about to mark stays
    item.remove(); drawn.delete(number);
  }
  for (const image of [...state.images].reverse()) if (!drawn.has(image.number)) {
    const item = card(image); drawn.set(image.number, item); at("images").prepend(item);
  }
  const step = 600 / Math.max(1, state.scores.length);
  at("series").replaceChildren(make("line", { x1: 0, x2: 600, y1: 160 - 160 * state.threshold, y2: 160 - 160 * state.threshold, class: "threshold" }), ...state.scores.map(
    ([, score, decision], place) => make("circle", { cx: (place + 0.5) * step, cy: 160 - 160 * score, r: 2.5, class: `point ${decision}` })));
  const odd = state.scores.filter(([, , decision]) => decision !== "good").length;
  at("series-words").textContent = `The last ${state.scores.length} scores, ${odd} of them not good; the dashed line is the threshold, ${state.threshold}.`;
  const bars = [];
  for (const kind of ["reference", "recent"]) {
    const total = state[kind].reduce((sum, count) => sum + count, 0) || 1;
    state[kind].forEach((count, place) => bars.push(make("rect", {
      x: place * 600 / state[kind].length, width: 600 / state[kind].length, y: 120 - 120 * count / total,
      height: 120 * count / total, class: kind })));
  }
  at("histogram").replaceChildren(...bars);
}

async function look() {
  try {
    const answer = await fetch("api/state");
    if (!answer.ok) throw new Error((await answer.json()).error);
    show(await answer.json());
  } catch (error) { at("counts").textContent = `The watch does not answer: ${error.message}`; }
  setTimeout(look, 1000);
}

async function ask() {
  const rate = at("rate").value;
  const answer = await fetch(`api/would?rate=${rate}`);
  const found = await answer.json();
  at("would").textContent = answer.ok
    ? `With a rate of ${(100 * rate).toFixed(1)} % the threshold would be ${found.threshold.toFixed(3)}, and ${found.anomalous} of the last ${found.images} images anomalous.`
    : found.error;
}

at("rate").addEventListener("input", ask);
look();
ask();
