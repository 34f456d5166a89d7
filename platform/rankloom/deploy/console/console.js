// The console: plain JavaScript, no dependencies, no requests to anywhere but this endpoint.
"use strict";

const MOST = 3;
const element = (id) => document.getElementById(id);
let running = [];
let seen = null;
let rates = [];
let shownModels = "";

function headers(more = {}) {
  const key = sessionStorage.getItem("rankloom-key");
  return key ? { authorization: `Bearer ${key}`, ...more } : more;
}

function make(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function tell(text) {
  element("notice").textContent = text;
  element("notice").hidden = !text;
}

// ---- what is served

async function look() {
  try {
    const answer = await fetch("console/state", { headers: headers() });
    if (answer.status === 401) {
      element("key-form").hidden = false;
      return;
    }
    const state = await answer.json();
    if (!answer.ok) throw new Error(state.error.message);
    element("key-form").hidden = true;
    tell("");
    measure(state);
    show(state);
  } catch (error) {
    tell(`The endpoint can't be reached: ${error.message}`);
  }
}

function measure(state) {
  const told = state.requests !== undefined; // to an admin, or where there are no keys
  for (const id of ["figures", "trace"]) element(id).toggleAttribute("hidden", !told);
  if (!told) return;
  const now = performance.now();
  if (seen) {
    const rate = Math.max(0, ((state.completion_tokens - seen.tokens) * 1000) / (now - seen.at));
    rates = [...rates.slice(-59), rate];
    const top = Math.max(1, ...rates);
    const points = rates.map((each, i) => `${((60 - rates.length + i) * 120) / 59},${31 - (29 * each) / top}`);
    element("trace").querySelector("polyline").setAttribute("points", points.join(" "));
    element("rate").textContent = rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString();
  }
  seen = { tokens: state.completion_tokens, at: now };
  element("running").textContent = state.in_flight;
  element("answered").textContent = state.requests.toLocaleString();
}

function show(state) {
  const listed = JSON.stringify(state.models);
  if (listed === shownModels) return;
  shownModels = listed;
  element("base").textContent = `${state.models.length} models on ${state.base}, context ${state.context}`;
  const chosen = new Set(ticked());
  element("models").replaceChildren(...state.models.map((model, i) => {
    const label = make("label");
    const box = make("input");
    box.type = "checkbox";
    box.name = "model";
    box.value = model.id;
    box.checked = chosen.size ? chosen.has(model.id) : i < 2;
    label.append(box, ` ${model.id}`);
    return label;
  }));
  limit();
  element("cards").replaceChildren(...state.models.filter((model) => model.ref).map(card));
}

function card(model) {
  const article = make("article");
  article.append(make("h3", model.id), make("p", `${model.ref}, ${model.method}, ${model.created}`));
  if (!model.rows.length) {
    article.append(make("p", "without a scorecard"));
    return article;
  }
  const table = make("table");
  const head = make("tr");
  head.append(...["", "adapter", "base"].map((text) => {
    const cell = make("th", text);
    cell.scope = "col";
    return cell;
  }));
  table.append(head);
  for (const [measure, ...values] of model.rows) {
    const row = make("tr");
    const name = make("th", measure);
    name.scope = "row";
    row.append(name, ...values.map((value) => make("td", value)));
    table.append(row);
  }
  article.append(table);
  return article;
}

function ticked() {
  return [...document.querySelectorAll("input[name=model]:checked")].map((box) => box.value);
}

function limit() {
  const full = ticked().length >= MOST;
  for (const box of document.querySelectorAll("input[name=model]")) box.disabled = full && !box.checked;
  element("send").disabled = running.length > 0 || ticked().length === 0;
}

// ---- asking

async function ask(model) {
  const article = make("article");
  const facts = make("p", "waiting");
  const text = make("pre");
  text.setAttribute("aria-live", "off");
  article.append(make("h3", model), facts, text);
  element("answers").append(article);
  const stop = new AbortController();
  running.push(stop);
  const began = performance.now();
  let first = null;
  try {
    const system = element("system").value.trim();
    const messages = [{ role: "user", content: element("prompt").value }];
    if (system) messages.unshift({ role: "system", content: system });
    const answer = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers({ "content-type": "application/json" }),
      signal: stop.signal,
      body: JSON.stringify({
        model, messages, stream: true, stream_options: { include_usage: true },
        max_tokens: Number(element("max-tokens").value), temperature: Number(element("temperature").value),
      }),
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const version = answer.headers.get("x-rankloom-version");
    const by = answer.headers.get("x-rankloom-adapter") + (version ? `@${version}` : "");
    for await (const chunk of events(answer.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const now = performance.now();
      if (chunk.choices.length) {
        first ??= now;
        text.textContent += chunk.choices[0].delta.content ?? "";
      }
      if (chunk.usage) {
        const tokens = chunk.usage.completion_tokens;
        const pace = tokens > 1 ? `, ${((1000 * (tokens - 1)) / Math.max(1, now - first)).toFixed(1)} tokens/s` : "";
        facts.textContent = `${by}: ${tokens} tokens, first after ${Math.round(first - began)} ms${pace}`;
      } else {
        facts.textContent = by;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") {
      facts.textContent = "stopped";
    } else {
      article.className = "failed";
      facts.textContent = "failed";
      text.textContent += error.message;
    }
  } finally {
    running = running.filter((each) => each !== stop);
    text.setAttribute("aria-live", "polite");
    element("stop").disabled = running.length === 0;
    limit();
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running.length) return;
  element("answers").replaceChildren();
  for (const model of ticked()) ask(model);
  element("stop").disabled = running.length === 0;
  limit();
});
element("ask").addEventListener("change", limit);
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("ask").requestSubmit();
});
element("stop").addEventListener("click", () => running.forEach((each) => each.abort()));
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("rankloom-key", element("key").value.trim());
  element("key").value = "";
  look();
});
look();
setInterval(look, 1000);
