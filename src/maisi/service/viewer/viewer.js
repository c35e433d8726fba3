// The page of the service: orders, jobs, and three planes of an item. Talks to /api and to nothing else.
"use strict";

const byId = (id) => document.getElementById(id);
const shown = { job: null, item: null };
const sent = new Map();
let jobs = [];
let listed = "";
let asked = 0;

async function call(path, options = {}) {
  const answer = await fetch(path, options);
  const told = answer.status === 204 ? null : await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.error || `${answer.status} ${answer.statusText}`);
  return told;
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// --- orders

function words(text, separator) {
  return text.split(separator).map((word) => word.trim()).filter(Boolean);
}

async function send(file) {
  const known = [file.name, file.size, file.lastModified].join("/");
  if (!sent.has(known)) {
    const [, stem, ending] = file.name.match(/^(.*?)(\.nii\.gz|\.nii|\.nrrd|\.zip)?$/i);
    const clean = stem.replace(/[^A-Za-z0-9._-]/g, "").replace(/^[^A-Za-z0-9]+/, "").slice(0, 80) || "volume";
    const path = `api/files/${encodeURIComponent(clean + (ending || ""))}`;
    sent.set(known, (await call(path, { method: "PUT", body: file })).file);
  }
  return sent.get(known);
}

async function wishes(form) {
  const mode = form.mode.value;
  const asked = { seed: Number(form.seed.value), count: Number(form.count.value), model: form.model.value };
  if (form.tumor.value.trim()) asked.tumor = words(form.tumor.value, ";");
  if (mode === "region") {
    asked.region = [...form.querySelectorAll("[name=region]:checked")].map((box) => box.value);
    if (form.size.value.trim()) asked.size = form.size.value;
    if (form.spacing.value.trim()) asked.spacing = form.spacing.value;
    if (!asked.size && !asked.spacing) asked.fov = "auto";
    if (form.structure.value.trim()) asked.structure = words(form.structure.value, /[,;]/);
    return asked;
  }
  if (mode === "image") {
    if (!form.image.files.length) throw new Error("Choose the CT to paint into.");
    asked.image = await send(form.image.files[0]);
  }
  if (form.mask.files.length) asked.mask = await send(form.mask.files[0]);
  else if (mode === "mask") throw new Error("Choose the label map to follow.");
  return asked;
}

async function order(event) {
  event.preventDefault();
  const form = event.target, button = form.querySelector("button");
  byId("fault").textContent = "";
  button.disabled = true;
  try {
    const body = JSON.stringify(await wishes(form));
    const job = await call("api/jobs", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    shown.job = job.id;
    shown.item = null;
    await refresh();
  } catch (error) {
    byId("fault").textContent = error.message;
  }
  button.disabled = false;
}

function choose() {
  const mode = byId("order").mode.value;
  for (const part of document.querySelectorAll("[data-modes]")) {
    part.hidden = !part.dataset.modes.split(" ").includes(mode);
  }
}

// --- jobs

function summary(job) {
  const asked = job.request;
  const parts = [(asked.region || []).join(" + "), asked.mask, asked.image, (asked.size || []).join(" x ")];
  const tumors = (asked.tumor || []).map((wish) => wish.kind);
  return [...parts, tumors.length ? `tumours: ${tumors.join(", ")}` : "", `seed ${asked.seed || 0}`].filter(Boolean).join(", ");
}

function entry(job) {
  const told = element("div", { className: "told", textContent: summary(job) });
  const row = element("li", {}, element("strong", { textContent: job.state }), " ");
  if (job.state === "waiting" || job.state === "running") {
    row.append(element("button", { className: "small", textContent: "cancel", onclick: () => act(job, "cancel") }));
  } else {
    row.append(element("button", { className: "small", textContent: "delete", onclick: () => act(job, "delete") }));
  }
  row.append(told);
  for (const note of job.notes) row.append(element("div", { className: "told", textContent: note }));
  if (job.error) row.append(element("div", { textContent: job.error }));
  if (job.running) {
    const { item, stage, done, total } = job.running;
    row.append(`item ${item}: ${stage}`, element("progress", { max: total, value: done }));
  }
  const items = element("div", { className: "items" });
  for (const item of job.items) {
    const look = () => show(job.id, item.number).catch((error) => { byId("fault").textContent = error.message; });
    const button = element("button", { textContent: item.number, title: item.faults.join(" "), onclick: look });
    button.classList.toggle("failed", !item.passed);
    button.classList.toggle("shown", shown.job === job.id && shown.item === item.number);
    items.append(button);
  }
  row.append(items);
  return row;
}

async function act(job, what) {
  try {
    if (what === "cancel") await call(`api/jobs/${job.id}/cancel`, { method: "POST" });
    else await call(`api/jobs/${job.id}`, { method: "DELETE" });
  } catch (error) {
    byId("fault").textContent = error.message;
  }
  await refresh();
}

async function refresh() {
  jobs = await call("api/jobs");
  const now = JSON.stringify(jobs);
  if (now !== listed) byId("jobs").replaceChildren(...jobs.map(entry));
  listed = now;
  const wanted = jobs.find((job) => job.id === shown.job);
  if (wanted && shown.item === null && wanted.items.length) await show(wanted.id, wanted.items[0].number);
  if (!wanted && shown.item !== null) clear();
}

async function watch() {
  try {
    await refresh();
    byId("lost").textContent = "";
  } catch (error) {
    byId("lost").textContent = `The list of jobs did not come (${error.message}).`;
  }
  const busy = jobs.some((job) => job.state === "running" || job.state === "waiting");
  setTimeout(watch, busy ? 1000 : 5000);
}

// --- one item

function clear() {
  Object.assign(shown, { job: null, item: null });
  byId("title").textContent = "Nothing to see: make something, or choose an item of a job.";
  byId("tools").hidden = true;
  for (const part of ["planes", "legend", "faults"]) byId(part).replaceChildren();
}

async function show(id, number) {
  const mine = ++asked;
  const item = await call(`api/jobs/${id}/items/${number}`);
  if (mine !== asked) return; // another was asked for meanwhile
  Object.assign(shown, { job: id, item: number });
  const size = item.size.join(" x "), spacing = item.spacing_mm.join(" x ");
  byId("title").textContent = `Job ${id}, item ${number}: ${size} voxels of ${spacing} mm`;
  byId("tools").hidden = false;
  const labelled = Object.keys(item.labels).length > 0;
  byId("overlay").disabled = !labelled;
  byId("get-labels").hidden = !labelled;
  for (const part of ["image", "labels", "record"]) byId(`get-${part}`).href = `api/jobs/${id}/items/${number}/${part}`;
  const job = jobs.find((one) => one.id === id);
  const told = job && job.items.find((one) => one.number === number);
  byId("faults").textContent = told ? told.faults.join(" ") : "";
  byId("legend").replaceChildren(...Object.entries(item.labels).map(([name, colour]) => {
    const row = element("li", { textContent: name });
    row.style.setProperty("--colour", colour);
    return row;
  }));
  byId("planes").replaceChildren(...["axial", "coronal", "sagittal"].map((plane) => figure(plane, item)));
  byId("jobs").replaceChildren(...jobs.map(entry));
}

function figure(plane, item) {
  const axis = { axial: 2, coronal: 1, sagittal: 0 }[plane];
  const count = item.size[axis];
  const image = element("img", { alt: `${plane} slice` });
  const slider = element("input", { type: "range", min: 0, max: count - 1, value: item.centre[axis], ariaLabel: `${plane} slice` });
  const number = element("span");
  const draw = () => {
    number.textContent = `${Number(slider.value) + 1} / ${count}`;
    const how = new URLSearchParams({ window: byId("window").value, labels: byId("overlay").checked });
    image.src = `api/jobs/${shown.job}/items/${shown.item}/slices/${plane}/${slider.value}?${how}`;
  };
  slider.addEventListener("input", draw);
  image.addEventListener("wheel", (event) => {
    event.preventDefault();
    slider.value = Number(slider.value) - Math.sign(event.deltaY);
    draw();
  }, { passive: false });
  const [left, right] = { axial: "RL", coronal: "RL", sagittal: "AP" }[plane];
  const ends = [element("b", { className: "left", textContent: left }), element("b", { className: "right", textContent: right })];
  const made = element("figure", {}, image, ...ends, element("figcaption", {}, plane, slider, number));
  made.draw = draw;
  draw();
  return made;
}

function redraw() {
  for (const plane of byId("planes").children) plane.draw();
}

async function begin() {
  const about = await call("api");
  byId("version").textContent = about.maisi;
  byId("regions").replaceChildren(...about.regions.map((region) => element(
    "label", {}, element("input", { type: "checkbox", name: "region", value: region, checked: region === "chest" }), ` ${region}`,
  )));
  byId("models").replaceChildren(...about.models.map((name) => element("option", { textContent: name })));
  byId("window").replaceChildren(...about.windows.map((name) => element("option", { textContent: name })));
  byId("order").addEventListener("submit", order);
  for (const radio of byId("order").mode) radio.addEventListener("change", choose);
  byId("window").addEventListener("change", redraw);
  byId("overlay").addEventListener("change", redraw);
  choose();
  await watch();
  const first = jobs.find((job) => job.items.length);
  if (shown.job === null && first) await show(first.id, first.items[0].number);
}

begin().catch((error) => { byId("fault").textContent = error.message; });
