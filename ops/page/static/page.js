"use strict";
// Whatever comes from a webhook becomes text (textContent, append of strings), never HTML.

const KEPT = 100; // rows, as many as the relay keeps
const EVERY = 1000; // milliseconds
const REFRESH = 3; // times that
const PATIENCE = 5000; // milliseconds; then it is asked anew: a network that was changed or asleep may never answer

const $ = (id) => document.getElementById(id);
const list = $("webhooks"); // null in a live relay
const editor = $("editor");

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

function button(words, action) {
  const made = make("button", "plain small", words);
  made.type = "button";
  made.addEventListener("click", () => action().catch((error) => say(error.message)));
  return made;
}

let silence;
function say(words) {
  $("said").textContent = words;
  clearTimeout(silence);
  silence = setTimeout(() => { $("said").textContent = ""; }, 4000);
}

async function get(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    $("lost").hidden = false;
    throw new Error("The relay does not answer.");
  }
  $("lost").hidden = true;
  return response;
}

async function getText(path) {
  const response = await get(path);
  if (!response.ok) throw new Error("The relay no longer has it.");
  return response.text();
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not allowed, or not a secure context, like http://192.168.1.2
    const before = document.activeElement;
    const area = make("textarea", "unseen");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    before.focus();
  }
  say("Copied.");
}

// --- What is true of every relay: warnings, steps, counts ---

// Change only what differs, so that focus and selection stay.
function morph(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeName !== fresh.nodeName || old.id !== fresh.id) return old.replaceWith(fresh);
  if (old.nodeType === Node.TEXT_NODE) { old.data = fresh.data; return; }
  for (const name of old.getAttributeNames()) if (!fresh.hasAttribute(name)) old.removeAttribute(name);
  for (const name of fresh.getAttributeNames()) {
    if (old.getAttribute(name) !== fresh.getAttribute(name)) old.setAttribute(name, fresh.getAttribute(name));
  }
  const [before, after] = [[...old.childNodes], [...fresh.childNodes]];
  before.slice(after.length).forEach((node) => node.remove());
  after.forEach((node, index) => (index < before.length ? morph(before[index], node) : old.append(node)));
}

const troubles = () => [...document.querySelectorAll("[data-key]")].map((element) => element.dataset.key);

let etag = "";
async function refresh() {
  const response = await get("/", { headers: { "If-None-Match": etag }, signal: AbortSignal.timeout(PATIENCE) });
  if (response.status !== 200) return; // 304: nothing has changed
  etag = response.headers.get("ETag");
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
  const known = troubles();
  for (const part of document.querySelectorAll("[data-follow]")) {
    const now = fresh.getElementById(part.id);
    if (now) morph(part, document.adoptNode(now));
  }
  const added = troubles().find((key) => !known.includes(key));
  if (added) say(document.querySelector(`[data-key="${added}"] h2`).textContent);
}

// --- The webhooks of a dry run ---

let latest = 0;
let held = []; // new ones that wait, because somebody reads

function row(webhook) {
  const at = new Date(webhook.at * 1000);
  const time = make("time", "", at.toLocaleTimeString([], { hour12: false }));
  time.dateTime = at.toISOString();
  time.title = at.toString();
  const name = make("b", "");
  for (const part of (webhook.event || "(no name)").split(/(?<=[:_])/)) name.append(part, make("wbr", "")); // a long one breaks here
  const summary = make("summary", "", time, name);
  summary.append(make("span", "person", webhook.person || "(nobody)"));
  summary.append(make("span", `chip ${webhook.outcome}`, webhook.title));
  const more = [webhook.reason, webhook.size > 100_000 && `${webhook.size.toLocaleString()} bytes`, webhook.sample && "a sample"];
  if (more.some(Boolean)) summary.append(make("span", "reason", more.filter(Boolean).join(" · ")));
  const details = make("details", "", summary);
  details.dataset.number = webhook.number;
  details.addEventListener("toggle", () => { if (details.open) fill(details); });
  return make("li", "", details);
}

async function fill(details) {
  if (details.dataset.filled) return;
  details.dataset.filled = "yes";
  const inside = make("div", "inside", "Loading …");
  details.append(inside);
  try {
    const text = await getText(`/webhooks/${details.dataset.number}`);
    inside.replaceChildren(...contents(details.dataset.number, JSON.parse(text)));
  } catch (error) {
    inside.remove();
    delete details.dataset.filled; // the next time it is opened
    details.open = false;
    say(error.message);
  }
}

function contents(number, webhook) {
  const changes = make("ul", "changes", ...webhook.changes.map((sentence) => make("li", "", sentence)));
  const copies = webhook.whole ? [button("Copy curl", () => copyPart(number, "curl"))] : [];
  const pair = make("div", "pair", side(number, "webhook", "Webhook", webhook, ...copies));
  if (webhook.call.length) pair.append(side(number, "call", "Track call", webhook));
  return [make("p", "answer", webhook.answer), changes, pair];
}

function side(number, part, title, webhook, ...buttons) {
  const { text, shown, length } = webhook[part];
  const pre = make("pre", "");
  pre.tabIndex = 0; // scrolled with the keyboard
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", title);
  pre.append(...highlighted(text || "(no body)"));
  const head = make("div", "title", make("h3", "", title), ...buttons, button("Copy JSON", () => copyPart(number, part)));
  const made = make("div", "", head, pre);
  if (part === "webhook" && !webhook.whole) made.append(make("p", "cut", "Only its beginning is kept: the webhooks since then took the room."));
  else if (shown < length) made.append(cut(number, part, shown, length, pre));
  return made;
}

function cut(number, part, shown, length, pre) {
  const words = `Cut: these are the first ${shown.toLocaleString()} of ${length.toLocaleString()} characters. `;
  const note = make("p", "cut", words, button("Show all", async () => {
    pre.textContent = await getText(`/webhooks/${number}/${part}`);
    note.textContent = `All ${length.toLocaleString()} characters.`;
    pre.focus();
  }));
  return note;
}

// The names in JSON stand out.
function highlighted(text) {
  return text.split(/^( *"(?:[^"\\]|\\.)*":)/m).map((piece, index) => (index % 2 ? make("b", "", piece) : piece));
}

async function copyPart(number, part) {
  await copy(await getText(`/webhooks/${number}/${part}`));
}

// Whether rows that move would disturb somebody.
function reading() {
  const selection = getSelection();
  return list.contains(document.activeElement) || list.querySelector("details[open]") !== null ||
    (!selection.isCollapsed && list.contains(selection.anchorNode)) || list.getBoundingClientRect().top < 0;
}

let following = null;
function follow() {
  following ??= fetchNew().finally(() => { following = null; });
  return following;
}

async function fetchNew() {
  const { webhooks } = await (await get(`/webhooks?after=${latest}`, { signal: AbortSignal.timeout(PATIENCE) })).json();
  if (webhooks.length) {
    latest = webhooks.at(-1).number;
    changed = true;
  }
  held = [...held, ...webhooks].slice(-KEPT);
  if (held.length && !reading()) release();
  showBadge();
}

function showBadge() {
  $("new").hidden = !held.length;
  if (held.length) $("new").textContent = `${held.length} new`;
  document.title = (held.length ? `(${held.length}) ` : "") + "Route to Segment";
}

function release() {
  list.prepend(...held.map(row).reverse());
  held = [];
  $("none").hidden = true;
  showBadge();
  const last = [...list.children].slice(KEPT);
  for (const item of last) if (!item.querySelector("[open]") && !item.contains(document.activeElement)) item.remove();
}

// --- Samples ---

let draft = "";

async function loadSample() {
  const name = $("sample").value;
  try {
    $("body").value = name ? JSON.stringify(JSON.parse(await getText(`/samples/${name}`)), null, 2) : draft;
    checkBody();
  } catch (error) {
    $("body-note").textContent = error.message;
  }
}

function checkBody() {
  let note = "";
  try { JSON.parse($("body").value); }
  catch { note = "This is not JSON. It is sent as it stands."; }
  $("body-note").textContent = note;
}

async function send() {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: $("body").value };
  const response = await get("/sample", options);
  const { status, answer, number, reason } = await response.json();
  if (!response.ok) { $("body-note").textContent = `It was not sent: ${reason}.`; return; }
  editor.close();
  if ($("sample").value) $("body").value = ""; // the next one has an event_id of its own
  while (latest < number) await follow();
  release();
  const details = list.querySelector(`[data-number="${number}"]`);
  if (!details) return; // the relay could not remember it
  details.open = true;
  details.querySelector("summary").focus();
  say(`${status} ${answer.status}`);
}

// --- Start ---

let ticks = 0;
let changed = false;
async function tick() {
  if (document.hidden) return;
  try {
    // A change shows in the counts a tick later: the relay makes the page once a second.
    if (changed || ++ticks % REFRESH === 0) {
      changed = false;
      await refresh();
    }
    if (list) await follow();
  } catch { /* said in #lost; the next time */ }
}

async function run() {
  await tick();
  setTimeout(run, EVERY);
}

$("copy").addEventListener("click", () => copy($("address").textContent));
document.addEventListener("visibilitychange", tick);

if (list) {
  $("new").addEventListener("click", () => {
    release();
    list.querySelector("summary").focus();
  });
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    const next = step && event.target.matches("summary") && event.target.closest("li")[step];
    if (!next) return;
    event.preventDefault();
    next.querySelector("summary").focus();
  });
  $("compose").addEventListener("click", () => {
    editor.showModal();
    if ($("body").value) return;
    if (!$("sample").value) editor.querySelector("form").reset(); // an emptied one: back to the usual sample
    loadSample();
  });
  $("cancel").addEventListener("click", () => editor.close());
  $("sample").addEventListener("change", loadSample);
  $("body").addEventListener("input", () => {
    draft = $("body").value;
    $("sample").value = "";
    checkBody();
  });
  $("body").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("send").click();
  });
  editor.querySelector("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send().catch((error) => { $("body-note").textContent = error.message; });
  });
}
run();
