"use strict";
const at = (id) => document.getElementById(id);
const wished = { good: "Defect missed", anomalous: "Good after all", unsure: "Good after all" };
const drawn = new Map();
let drawnName = null;
let modelsShown = "";

function make(name, attributes, text) {
  const svg = ["circle", "line", "rect"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

async function tell(act, wish, said, words) {
  const who = at("who").value.trim();
  if (!who) { said.textContent = "Enter your name first."; at("who").focus(); return false; }
  said.textContent = "…";
  try {
    const answer = await fetch(`api/${act}`, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...wish, who }),
    });
    const found = await answer.json();
    said.textContent = answer.ok ? words(found) : found.error;
    return answer.ok;
  } catch (error) { said.textContent = `The watch does not answer: ${error.message}`; return false; }
}

async function mark(number, what, button) {
  if (await tell("mark", { number, what }, at("said"), (found) => `Copied to ${found.copy}.`)) button.disabled = true;
}

async function judge(what) {
  const name = drawnName;
  if (!name) return;
  if (await tell("judge", { name, what }, at("judged"), () => `${name}: ${what}.`)) await refresh();
}

async function recalibrate() {
  await tell("recalibrate", { rate: Number(at("rate").value) }, at("recalibrated"), (found) =>
    `${found.name} rests on ${found.images} good images, ${found.alarms} of which the model in use calls anomalous; its threshold lies at ${found.threshold.toFixed(3)} of the old scores. Use it below.`);
  await refresh();
}

function showSample(sample, fixed) {
  const done = sample.good + sample.defect;
  at("sample-words").textContent = !sample.full
    ? (sample.size ? `${sample.left} of ${sample.size} images are drawn, each of all that came with the same chance. They can be judged when all are.` : "None is drawn: --sample 0.")
    : !done ? `${sample.left} images are drawn, each of all that came with the same chance. Judge all of them; with the first one, drawing ends.`
    : sample.left ? `${done} judged (${sample.good} good), ${sample.left} left.`
    : sample.good ? `All ${done} judged, ${sample.good} good: the threshold can be set anew below.`
    : `All ${done} judged, none good: lay it aside.`;
  at("fixed").textContent = fixed || "";
  at("recalibrate").disabled = Boolean(fixed) || !sample.good || sample.left > 0;
  at("lay-aside").hidden = !done;
  at("sample").hidden = !sample.next;
  if (sample.next !== drawnName) {
    drawnName = sample.next;
    if (drawnName) at("drawn").src = `drawn/${encodeURIComponent(drawnName)}`;
  }
}

function showModels(models) {
  const text = JSON.stringify(models);
  if (text === modelsShown) return;
  modelsShown = text;
  at("models").replaceChildren(...models.map((model) => {
    const item = make("li", {}), figures = model.figures;
    const state = model.gone ? ", in use, though its file has changed or gone since" : model.in_use ? ", in use" : model.wished ? ", from the next image on" : "";
    const words = !figures ? "not measured"
      : `${figures.alarms} alarms of ${figures.good} good, ${figures.found} of ${figures.defect} defects found` +
        (figures.auroc === null ? "" : `, AUROC ${figures.auroc.toFixed(3)}`) + (figures.unread ? `, ${figures.unread} could not be read` : "") + `, ${figures.milliseconds} ms an image`;
    item.append(make("p", {}, `${model.name}${state}: ${words}.`));
    if (!model.gone) for (const [act, label] of [["measure", "Measure"], ["use", "Use"]]) {
      if (act === "use" && model.in_use) continue;
      const button = make("button", { type: "button", "aria-label": `${label} ${model.name}` }, label);
      button.addEventListener("click", async () => {
        await tell(act, { model: model.name }, at("chosen"), () => act === "use" ? `${model.name} is used from the next image on.` : `${model.name} is measured.`);
        await refresh();
      });
      item.append(button);
    }
    return item;
  }));
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
  showSample(state.sample, state.fixed);
  showModels(state.models);
  at("retrain").textContent = state.retrain || "mark images first";
}

async function refresh() {
  try {
    const answer = await fetch("api/state");
    if (!answer.ok) throw new Error((await answer.json()).error);
    show(await answer.json());
  } catch (error) { at("counts").textContent = `The watch does not answer: ${error.message}`; }
}

async function look() {
  await refresh();
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
at("recalibrate").addEventListener("click", recalibrate);
at("lay-aside").addEventListener("click", async () => { if (await tell("lay_aside", {}, at("judged"), () => "Another sample is drawn.")) await refresh(); });
at("drawn-good").addEventListener("click", () => judge("good"));
at("drawn-defect").addEventListener("click", () => judge("defect"));
look();
ask();
