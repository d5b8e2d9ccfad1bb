"use strict";

const COLUMNS = ["name", "sku", "description", "price"];
const DEBOUNCE_MS = 150;
// Longer texts are cut here on the page. The editor shows the whole text.
const SHOWN_CHARS = 600;
const STATUS_MS = 2000;
const STATUS_BUSY_MS = 700;
const SEARCHABLE_POLL_MS = 60;
const SEARCHABLE_WAIT_MS = 60000;
const SURE_MS = 4000;

const $ = (id) => document.getElementById(id);
// touched: the user has edited, so rows must not move before the next search or page.
// cursor: the list's next and previous pages are found by the id of a row, {after} or {before}.
// near: the page's number is an estimate, and so are those of the pages reached from there.
const state = { q: "", page: 1, cursor: {}, near: false, request: null, shown: null, touched: false, applied: null };

class Refused extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.body = body;
  }
}

async function call(path, { method = "GET", body, revision, signal } = {}) {
  for (;;) {
    const headers = {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    if (revision !== undefined) headers["If-Match"] = `"${revision}"`;
    const token = sessionStorage.getItem("token");
    if (token && method !== "GET") headers.Authorization = `Bearer ${token}`;
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      reachable(false);
      throw new Refused(0, { error: { message: "the server can't be reached" } });
    }
    reachable(true);
    if (response.status === 204) return null;
    const answer = await response.json().catch(() => null);
    if (response.ok) return answer;
    const refused = new Refused(response.status, answer);
    // Forget a wrong token.
    if (response.status === 401) sessionStorage.removeItem("token");
    if (response.status !== 401 || !(await askToken(refused.message))) throw refused;
  }
}

function reachable(yes) {
  const banner = $("banner");
  banner.textContent = yes ? "" : "The server can't be reached. This page tries again by itself.";
  banner.hidden = yes;
}

function ask(dialog) {
  return new Promise((resolve) => {
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
    dialog.showModal();
  });
}

async function askToken(why) {
  $("token-why").textContent = why;
  const input = $("token").querySelector("input");
  input.value = "";
  if ((await ask($("token"))) !== "use" || !input.value) return false;
  sessionStorage.setItem("token", input.value);
  return true;
}

/* The list */

function address() {
  const query = new URLSearchParams();
  if (state.q) query.set("q", state.q);
  if (state.page > 1) query.set("page", state.page);
  for (const [key, id] of Object.entries(state.cursor)) query.set(key, id);
  const text = query.toString();
  return text ? `/?${text}` : "/";
}

function listing() {
  const by = Object.keys(state.cursor).length > 0;
  const query = new URLSearchParams(by ? state.cursor : { page: state.page });
  if (state.q) query.set("q", state.q);
  return `/api/v1/${state.q ? "search" : "products"}?${query}`;
}

async function load() {
  state.request?.abort();
  const request = (state.request = new AbortController());
  $("table").classList.add("stale");
  try {
    const found = await call(listing(), { signal: request.signal });
    if (request === state.request) show(found);
  } catch (error) {
    if (error.name === "AbortError" || request !== state.request) return;
    if (error.status === 0) setTimeout(() => request === state.request && load(), STATUS_MS);
    else fail(error.message);
  } finally {
    if (request === state.request) $("table").classList.remove("stale");
  }
}

/* Shows the changes of others, unless the user is editing. */
async function follow() {
  const request = state.request;
  const busy = () => state.touched || request !== state.request || document.querySelector("dialog[open], .sure");
  if (busy() || $("table").classList.contains("stale")) return;
  const found = await call(listing()).catch(() => null);
  if (!found || busy() || JSON.stringify(found.rows) === JSON.stringify(state.shown?.rows)) return;
  const focused = document.activeElement?.closest("#rows tr");
  const place = focused && [...focused.querySelectorAll("button")].indexOf(document.activeElement);
  show(found);
  const again = focused && [...$("rows").children].find((line) => line.row.id === focused.row.id);
  again?.querySelectorAll("button")[place]?.focus();
}

function fail(message) {
  $("rows").replaceChildren();
  $("table").hidden = true;
  $("empty").textContent = message;
  $("empty").hidden = false;
  $("summary").textContent = "";
}

function show(found) {
  const searching = Boolean(state.q);
  state.touched = false;
  state.shown = found;
  document.title = searching ? `${state.q} - refarch` : "refarch: products";
  $("title").textContent = searching ? `Results for \u201c${state.q}\u201d` : "Products";
  $("summary").textContent = searching ? `best matches first, in ${found.took_ms} ms`
    : `${found.total_estimated ? "about " : ""}${found.total.toLocaleString("en")} rows`;
  $("table").classList.toggle("listing", !searching);
  $("rows").replaceChildren(...found.rows.map((row) => rowElement(row, searching)));
  const none = found.rows.length === 0;
  $("table").hidden = none;
  $("empty").hidden = !none;
  $("empty").textContent = searching
    ? (state.page > 1 ? "No more results." : "Nothing found. Rows that are still being embedded appear here once they are searchable.")
    : (state.page > 1 ? "There is no such page." : "No products yet.\nrefarch generate --count 10000 --load");
  if (!searching) {
    state.near = found.approximate || (found.page === null && state.near);
    if (found.previous === null && !none && state.page > 1) {
      // Fewer rows were before the page than its number said.
      Object.assign(state, { page: 1, cursor: {}, near: false });
      history.replaceState(null, "", address());
    }
  }
  const number = (value) => value.toLocaleString("en");
  $("page").textContent = searching ? `Page ${state.page}`
    : `${state.near ? "About page" : "Page"} ${number(state.page)} of ${number(Math.max(state.page, found.pages))}`;
  $("previous").disabled = searching ? state.page <= 1 : found.previous === null;
  $("next").disabled = searching ? !found.has_next : found.next === null;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function rowElement(row, searching) {
  const line = element("tr");
  const score = element("td", "c-score");
  if (searching) score.append(scoreElement(row));
  line.append(score);
  for (const column of COLUMNS) {
    const cell = element("td", `c-${column}`);
    cell.append(valueElement(line, cell, column));
    line.append(cell);
  }
  const action = element("td", "c-action");
  const status = element("div", "state");
  status.setAttribute("aria-live", "polite");
  status.hidden = true;
  const remove = element("button", "remove", "Delete");
  remove.type = "button";
  remove.addEventListener("click", () => removeRow(line, remove));
  action.append(status, remove);
  line.append(action);
  line.row = row;
  line.status = status;
  for (const cell of line.querySelectorAll("td")) fill(cell, row);
  return line;
}

function scoreElement(row) {
  const box = element("div", "score");
  if (row.match !== "semantic") box.append(element("span", "exact", row.match === "sku" ? "exact SKU" : "exact name"));
  if (row.score !== null) {
    const part = Math.max(0, Math.min(1, row.score));
    if (row.match === "semantic") box.append(element("span", "", row.score.toFixed(2)));
    const meter = element("span", "meter");
    const filled = element("i");
    filled.style.width = `${Math.round(part * 100)}%`;
    meter.append(filled);
    box.append(meter);
  }
  return box;
}

function valueElement(line, cell, column) {
  const button = element("button", "cell");
  button.type = "button";
  cell.column = column;
  button.addEventListener("click", () => edit(line, cell));
  return button;
}

function fill(cell, row) {
  const button = cell.querySelector(".cell");
  if (!button) return;
  const value = row[cell.column];
  const text = value ?? "";
  button.textContent = text === "" ? "none" : text.length > SHOWN_CHARS ? `${text.slice(0, SHOWN_CHARS)}\u2026` : text;
  button.classList.toggle("none", text === "");
  button.setAttribute("aria-label", `Edit ${cell.column}: ${button.textContent}`);
}

/* Editing */

// draft: text that the server refused, and problem: the reason. So the user's text is not lost.
function edit(line, cell, draft, problem) {
  if (cell.querySelector("input, textarea")) return;
  state.touched = true;
  const button = cell.querySelector(".cell");
  const long = cell.column === "description";
  const field = element(long ? "textarea" : "input");
  const before = line.row[cell.column] ?? "";
  field.value = draft ?? before;
  field.setAttribute("aria-label", cell.column);
  if (!long && cell.column !== "price") field.maxLength = 255;
  const hint = element("div", "hint", problem ?? `Enter saves, Escape cancels${long ? ", Shift+Enter breaks the line" : ""}`);
  if (problem) {
    hint.classList.add("problem");
    hint.setAttribute("role", "alert");
  }
  const grow = () => {
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight + 2}px`;
  };
  button.hidden = true;
  cell.append(field, hint);
  if (long) {
    grow();
    field.addEventListener("input", grow);
  }
  // A refusal arrives late: the user may be typing in another field.
  if (!problem || !document.activeElement?.matches("input, textarea")) {
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
  let closed = false;
  const close = (keepFocus) => {
    closed = true;
    field.remove();
    hint.remove();
    button.hidden = false;
    if (keepFocus) button.focus();
  };
  const done = (keepFocus) => {
    if (closed) return;
    const value = field.value;
    close(keepFocus);
    if (value !== before) save(line, cell, value);
  };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Escape") {
      event.preventDefault();
      close(true);
    } else if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      done(true);
    }
  });
  field.addEventListener("blur", () => field.value !== draft && done(false));
}

function tell(line, text, kind = "") {
  line.status.className = `state ${kind}`;
  line.status.textContent = text;
  line.status.hidden = !text;
}

function refresh(line, row) {
  line.row = { ...line.row, ...row };
  for (const cell of line.querySelectorAll("td")) fill(cell, line.row);
}

async function save(line, cell, value, revision = line.row.revision) {
  const column = cell.column;
  const button = cell.querySelector(".cell");
  button.textContent = value.slice(0, SHOWN_CHARS) || "none";
  tell(line, "saving");
  const started = performance.now();
  try {
    const row = await call(`/api/v1/products/${line.row.id}`, { method: "PATCH", revision, body: { [column]: value === "" ? null : value } });
    refresh(line, row);
    watch(line, started);
  } catch (error) {
    if (error.status === 412) return settle(line, cell, value, error.body.current);
    fill(cell, line.row);
    tell(line, "");
    if (error.status === 404) return vanish(line);
    edit(line, cell, value, error.message);
  }
}

async function settle(line, cell, value, current) {
  $("theirs").textContent = (current[cell.column] ?? "none").slice(0, SHOWN_CHARS);
  $("mine").textContent = value.slice(0, SHOWN_CHARS) || "none";
  const choice = await ask($("conflict"));
  refresh(line, current);
  if (choice === "mine") return save(line, cell, value, current.revision);
  tell(line, "theirs kept");
}

/* Polls until the index holds the row as it is now. */
async function watch(line, started) {
  tell(line, "saved");
  const { id, revision } = line.row;
  while (performance.now() - started < SEARCHABLE_WAIT_MS) {
    const row = await call(`/api/v1/products/${id}`).catch(() => null);
    // A later edit starts its own watch.
    if (line.row.revision !== revision) return;
    const took = Math.round(performance.now() - started);
    if (row?.searchable) return tell(line, `searchable after ${took < 10000 ? `${took} ms` : `${Math.round(took / 1000)} s`}`, "good");
    await new Promise((resolve) => setTimeout(resolve, SEARCHABLE_POLL_MS));
  }
  tell(line, "saved; not searchable yet");
}

async function removeRow(line, button) {
  if (!button.classList.contains("sure")) {
    button.classList.add("sure");
    button.textContent = "Delete?";
    setTimeout(() => {
      button.classList.remove("sure");
      button.textContent = "Delete";
    }, SURE_MS);
    return;
  }
  try {
    await call(`/api/v1/products/${line.row.id}`, { method: "DELETE", revision: line.row.revision });
    vanish(line);
  } catch (error) {
    if (error.status === 404) return vanish(line);
    if (error.status === 412) refresh(line, error.body.current);
    tell(line, error.status === 412 ? "changed meanwhile; check the row and try again" : error.message, "bad");
  }
}

function vanish(line) {
  line.remove();
  state.touched = true;
  poll();
  if (!$("rows").children.length) load();
}

/* Adding */

$("add").addEventListener("click", () => {
  $("product-form").reset();
  $("product").querySelector(".problem").hidden = true;
  $("product").showModal();
});
for (const button of document.querySelectorAll("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
$("product-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = {};
  for (const [key, value] of new FormData(event.target)) body[key] = value === "" ? null : value;
  const problem = $("product").querySelector(".problem");
  const started = performance.now();
  try {
    const row = await call("/api/v1/products", { method: "POST", body });
    $("product").close();
    const line = rowElement({ ...row, match: "semantic", score: null }, Boolean(state.q));
    $("table").hidden = false;
    $("empty").hidden = true;
    $("rows").prepend(line);
    state.touched = true;
    watch(line, started);
    poll();
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
  }
});

/* Searching and paging */

let typing;
$("q").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => go($("q").value.trim(), 1, true), DEBOUNCE_MS);
});
$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typing);
  go($("q").value.trim(), 1);
});
function go(q, page, typed = false, cursor = {}) {
  if (q === state.q && page === state.page && JSON.stringify(cursor) === JSON.stringify(state.cursor) && state.shown) return;
  // Typing a term makes one history entry only.
  const replace = typed && Boolean(state.q) && Boolean(q);
  state.q = q;
  state.page = page;
  state.cursor = cursor;
  history[replace ? "replaceState" : "pushState"](null, "", address());
  load();
}
$("previous").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
function turn(by) {
  const page = Math.max(1, state.page + by);
  if (state.q || page === 1) go(state.q, page);
  else go("", page, false, by > 0 ? { after: state.shown.next } : { before: state.shown.previous });
  scrollTo({ top: 0 });
}
function fromAddress() {
  const query = new URLSearchParams(location.search);
  state.q = (query.get("q") ?? "").trim();
  const page = Number(query.get("page") ?? 1);
  state.page = Number.isSafeInteger(page) && page >= 1 ? page : 1;
  const key = state.q ? undefined : ["after", "before"].find((name) => /^-?\d+$/.test(query.get(name) ?? ""));
  state.cursor = key ? { [key]: query.get(key) } : {};
  $("q").value = state.q;
  load();
}
addEventListener("popstate", fromAddress);
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.activeElement?.matches("input, textarea") || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  $("q").focus();
  $("q").select();
});

/* The state of the index */

let polling;
async function poll() {
  clearTimeout(polling);
  let wait = STATUS_MS;
  if (!document.hidden) {
    try {
      const status = await call("/api/v1/status");
      wait = showStatus(status) ? STATUS_MS : STATUS_BUSY_MS;
      const applied = JSON.stringify([status.source_rows, status.indexed, status.workers.map((worker) => worker.applied)]);
      if (state.applied !== null && state.applied !== applied) follow();
      state.applied = applied;
    } catch {
      // call() has shown the banner.
    }
  }
  clearTimeout(polling);
  polling = setTimeout(poll, wait);
}
function showStatus(status) {
  const number = (value, about) => `${about ? "~" : ""}${value.toLocaleString("en")}`;
  const waiting = status.pending + ["live", "bulk"].reduce((sum, lane) => sum + status.queue[lane].visible + status.queue[lane].in_flight, 0);
  const { synced, proof } = status;
  $("s-rows").textContent = number(status.source_rows, status.source_rows_estimated);
  $("s-sync").textContent = synced ? "all" : number(status.in_sync, status.in_sync_estimated);
  $("s-pending").textContent = number(waiting, status.pending_estimated || status.queue.live.estimated || status.queue.bulk.estimated);
  const { p50, p99 } = status.freshness_ms;
  const time = (ms) => (ms < 1000 ? `${ms} ms` : ms < 120000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.round(ms / 60000)} min`);
  $("s-fresh").textContent = p50 === null ? "\u2013" : `p50 ${time(p50)}, p99 ${time(p99)}`;
  $("s-workers").textContent = number(status.workers.length);
  const ago = (s) => (s < 120 ? `${s} s` : s < 7200 ? `${Math.floor(s / 60)} min` : s < 172800 ? `${Math.floor(s / 3600)} h` : `${Math.floor(s / 86400)} days`);
  $("s-proof").textContent = proof.ended_at ? `proved ${ago(proof.age_s)} ago: ${number(proof.differences)} difference${proof.differences === 1 ? "" : "s"}` : proof.off ? "" : "not proved yet";
  $("s-proof").classList.toggle("bad", proof.overdue);
  $("s-capture").hidden = status.capture_faults.length === 0;
  $("s-capture").textContent = `not captured: ${status.capture_faults.join(", ")}`;
  $("s-dead").hidden = status.dead_letters === 0;
  $("s-dead").textContent = `${number(status.dead_letters)} dead letters`;
  $("s-bar").value = status.source_rows ? status.in_sync / status.source_rows : 1;
  $("s-bar").classList.toggle("running", !synced);
  return synced;
}
document.addEventListener("visibilitychange", () => document.hidden || poll());

fromAddress();
poll();
